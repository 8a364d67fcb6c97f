from setuptools import find_namespace_packages, setup

# genfast/kernels is a symlink to kernels/: namespace discovery follows it, so the wheel carries the files themselves.
setup(packages=find_namespace_packages(include=["genfast", "genfast.*"]))
