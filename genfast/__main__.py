"""``genfast`` and ``python -m genfast``: runs the command line and turns what goes wrong into one line."""

from __future__ import annotations

import os
import sys

_EXTRA = {"typer", "rich", "torchvision", "PIL", "matplotlib"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; ``sys.argv[1:]`` if None.

    Returns:
        The exit code: 0; 1 if training diverged or a check failed; 2 for a mistake of the user, told in one line on
        stderr (with GENFAST_TRACEBACK=1 in the environment: in full); 130 after Ctrl-C.
    """
    try:
        from genfast.cli import ClickException, app

        try:
            return app(arguments, prog_name="genfast", standalone_mode=False) or 0
        except ClickException as error:
            return _fail(error.format_message(), 2)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        return _fail(f"the command line needs {error.name}, of the [train] extra: pip install -e '.[train]'", 2)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("GENFAST_TRACEBACK"):
            raise
        return _fail(str(error), 2)
    except FloatingPointError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
