"""The HTML page about runs: what it says, in a real browser where one is installed."""

import json
import math
import re
import shutil

import pytest
import torch

from genfast import VAE, html_report, report
from tests.commands import fails, succeeds

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

# A name that would run, and ask another machine for a picture, on a page that does not escape it.
HOSTILE = "<img src=http:¦¦127.0.0.1:9¦x onerror=window.hacked=1><script>window.hacked=1<¦script>".replace("¦", "∕")


def make_run(folder, family="vae", rows=3, evaluation=None, likelihood="bernoulli", **settings):
    folder.mkdir(parents=True)
    settings = {
        "genfast": "1", "family": family, "data": "digits", "binarize": "none", "image_shape": [1, 28, 28],
        "train_images": 5000, "test_images": 1000, "lr": 0.001, "status": "finished", **settings,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(settings))
    history = [{"epoch": epoch, "loss": 100 / epoch, "seconds": 2.0} for epoch in range(1, rows + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    if likelihood:
        (folder / "config.json").write_text(json.dumps({"model_type": "VAE", "likelihood": likelihood}))
    if evaluation is not None:
        measured = {"data": "digits", "binarize": "none", "images": 1000, **evaluation}
        (folder / "evaluation.json").write_text(json.dumps(measured))
    report.save_grid(torch.rand(4, 1, 8, 8), folder / "samples.png")
    return folder


def frechet(value, half=0.5, n=2048):
    return {"frechet_distance": {"value": value, "low": value - half, "high": value + half, "n": n}}


def page_of(runs, tmp_path, **options):
    path = tmp_path / "page" / "report.html"
    path.parent.mkdir(exist_ok=True)
    notes = html_report.write_report(runs, path, **options)
    return path.read_text(encoding="utf-8"), notes


def tables(page):
    """Of each sortable table its headings and its rows of cells, as text."""

    def text(cell):
        # Behind the bar the unit of a heading, the interval of a number.
        return re.sub(r"<[^>]*>", "", cell.replace("<small>", "|"))

    found = []
    for table in re.findall(r'<table class="sortable">(.*?)</table>', page, re.DOTALL):
        head, body = table.split("<tbody>")
        headings = [text(cell) for cell in re.findall(r"<th .*?</th>", head)]
        rows = [re.findall(r"<t[hd].*?</t[hd]>", row) for row in re.findall(r"<tr>.*?</tr>", body)]
        found.append((headings, [[text(cell) for cell in row] for row in rows]))
    return found


def column(table, heading):
    headings, rows = table
    return [row[headings.index(heading)] for row in rows]


def test_a_run_without_a_metric_says_so(tmp_path):
    runs = [make_run(tmp_path / "a", evaluation=frechet(12.5)), make_run(tmp_path / "b")]
    runs.append(make_run(tmp_path / "c", rows=0))
    page, notes = page_of(runs, tmp_path)
    (table,) = tables(page)
    name = html_report.DEFINITIONS["frechet_distance"].title
    assert column(table, "run") == ["a", "b", "c"]
    assert column(table, name) == ["12.5|12.0 to 13.0, n = 2,048", "not measured", "not measured"]
    assert column(table, "epochs") == ["3", "3", "not measured"]
    assert notes == []
    assert escape_free(html_report.DEFINITIONS["frechet_distance"].text) in escape_free(page)


def escape_free(text):
    return re.sub(r"&[a-z#0-9]+;|['\"<>&]", "", text)


def test_the_best_is_marked_with_what_its_interval_does_not_tell_from_it(tmp_path):
    values = {"a": 12.0, "b": 10.2, "c": 10.0, "d": math.nan}
    runs = [make_run(tmp_path / name, evaluation=frechet(value)) for name, value in values.items()]
    page, _ = page_of(runs, tmp_path)
    marked = re.findall(r'<td class=best data-value="([\d.]+)">', page)
    assert marked == ["10.2", "10.0"]
    (table,) = tables(page)
    assert column(table, html_report.DEFINITIONS["frechet_distance"].title)[3] == "not a number"


def test_where_higher_is_better_the_highest_is_marked(tmp_path):
    for name, value in {"a": 0.5, "b": 0.88, "c": 0.9}.items():
        make_run(tmp_path / name, evaluation={"precision": {"value": value, "low": value - 0.02, "high": value + 0.02,
                                                            "n": 99}})  # fmt: skip
    page, _ = page_of([tmp_path / name for name in "abc"], tmp_path)
    assert re.findall(r'<td class=best data-value="([\d.]+)">', page) == ["0.88", "0.9"]


@pytest.mark.parametrize("name", ["frechet_distance", "precision", "recall", "coverage"])
def test_of_different_numbers_of_images_no_best_is_marked(name, tmp_path):
    for run, value, n in (("a", 0.1, 500), ("b", 0.9, 2048), ("c", 0.5, 2048)):
        about = {"value": value, "low": value - 0.01, "high": value + 0.01, "n": n}
        make_run(tmp_path / run, evaluation={"metrics": {name: about, "confidence": about}})
    page, _ = page_of([tmp_path / run for run in "abc"], tmp_path)
    # Confidence is a mean, whatever it is the mean of.
    assert re.findall(r'<td class=best data-value="([\d.]+)">', page) == ["0.9"]
    title = html_report.DEFINITIONS[name].title
    assert f"Not marked, since they depend on the number of images, which differs: {title}." in page
    page, _ = page_of([tmp_path / run for run in "bc"], tmp_path)
    assert page.count("<td class=best") == 2
    assert "Not marked" not in page


def test_runs_on_different_data_stand_in_tables_of_their_own(tmp_path):
    runs = [
        make_run(tmp_path / "a"), make_run(tmp_path / "b", data="mnist", train_images=60_000),
        make_run(tmp_path / "c", binarize="dynamic"), make_run(tmp_path / "d"),
    ]  # fmt: skip
    page, notes = page_of(runs, tmp_path)
    assert sorted(column(table, "run") for table in tables(page)) == [["a", "d"], ["b"], ["c"]]
    assert len(notes) == 1
    assert "3 sets of data, whose numbers do not compare" in notes[0]
    assert notes[0].replace("'", "&#x27;") in page


def test_likelihoods_of_different_treatments_have_columns_of_their_own(tmp_path):
    evaluation = {"elbo": -100.0, "nll": 80.0, "log_likelihood": -95.0, "k": 50, "standard_error": 1.0}
    runs = [
        make_run(tmp_path / "a", evaluation=evaluation),
        make_run(tmp_path / "b", evaluation=evaluation, likelihood="gaussian"),
        make_run(tmp_path / "c", family="flow", evaluation={"bits_per_dim": 1.25}, likelihood=""),
    ]
    (table,) = [table for table in tables(page_of(runs, tmp_path)[0]) if "family" in table[0]]
    for data, at in (("bernoulli likelihood of grey pixels", 0), ("gaussian likelihood of grey pixels", 1)):
        cells = ["not measured"] * 3
        cells[at] = "-95.0|-97.0 to -93.0, n = 1,000"
        assert column(table, f"log p(x), importance-weighted|nats per image, 50 draws; {data}") == cells
        cells[at] = "-100|n = 1,000"
        assert column(table, f"ELBO|nats per image; {data}") == cells
    (bits,) = [heading for heading in table[0] if heading.startswith("bits per dimension|")]
    assert column(table, bits)[2] == "1.250|n = 1,000"


def test_bounds_in_different_numbers_of_steps_have_columns_of_their_own(tmp_path):
    about = {"value": 3.0, "low": 2.9, "high": 3.1, "n": 100, "kind": "bits_per_dim", "bound": "upper", "k": None,
             "unit": "bits per dimension", "data": "pixels of 256 grey levels"}  # fmt: skip
    evaluations = {
        "a": {"metrics": {"bits_per_dim": {**about, "steps": 10}}},
        "b": {"metrics": {"bits_per_dim": {**about, "steps": 1000}}},
        # Without --metrics, and as files of before had it.
        "c": {"bits_per_dim": 3.0, "steps": 10},
        "d": {"steps": 1000, "metrics": {"bits_per_dim": about}},
        "flow": {"metrics": {"bits_per_dim": {**about, "steps": None}}},
    }
    for name, evaluation in evaluations.items():
        make_run(tmp_path / name, family="ddpm", evaluation=evaluation, likelihood="")
    (table,) = tables(page_of([tmp_path / name for name in evaluations], tmp_path)[0])
    in_column = {
        heading: "".join(run for run, cell in zip(evaluations, column(table, heading), strict=True) if cell[0] == "3")
        for heading in table[0] if heading.startswith("bits per dimension|")
    }  # fmt: skip
    of = "pixels of 256 grey levels"
    assert in_column == {
        f"bits per dimension|bits per dimension, bound in 10 steps; {of}": "ac",
        f"bits per dimension|bits per dimension, bound in 1,000 steps; {of}": "bd",
        f"bits per dimension|bits per dimension; {of}": "flow",
    }


def test_an_evaluation_on_other_data_is_not_in_the_table(tmp_path):
    run = make_run(tmp_path / "a", evaluation={**frechet(3.0), "data": "fashion-mnist"})
    page, _ = page_of([run], tmp_path)
    (table,) = tables(page)
    assert html_report.DEFINITIONS["frechet_distance"].title not in table[0]
    assert "Evaluated on other data than it was trained on (fashion-mnist, grey pixels)" in page


def test_settings_that_differ_stand_beside_the_metrics_of_one_family(tmp_path):
    runs = [make_run(tmp_path / "a", beta=5.0), make_run(tmp_path / "b")]
    (table,) = tables(page_of(runs, tmp_path)[0])
    assert table[0][:2] == ["run", "beta"]
    assert column(table, "beta") == ["5", "none"]
    assert "lr" not in table[0]


def test_of_several_families_they_have_a_table_of_their_own(tmp_path):
    runs = [make_run(tmp_path / "a", lr=0.01), make_run(tmp_path / "b", family="ae")]
    metrics, settings = tables(page_of(runs, tmp_path)[0])
    assert "lr" not in metrics[0]
    assert settings == (["run", "lr"], [["a", "0.01"], ["b", "0.001"]])


def test_sorted_by_a_metric_the_best_comes_first(tmp_path):
    values = {"a": 9.0, "b": None, "c": 100.0, "d": 10.5}
    runs = [make_run(tmp_path / name, evaluation=value and frechet(value)) for name, value in values.items()]
    page, notes = page_of(runs, tmp_path, sort="frechet_distance")
    assert column(tables(page)[0], "run") == ["a", "d", "c", "b"]
    assert notes == ["b has no frechet_distance: genfast evaluate --metrics measures it"]


def test_a_warning_of_the_training_is_shown(tmp_path):
    run = make_run(tmp_path / "a")
    (run / "metrics.jsonl").write_text('{"epoch": 2, "loss": NaN, "warning": "collapse: one & the same"}\n')
    assert "Epoch 2: collapse: one &amp; the same" in page_of([run], tmp_path)[0]


def test_parameters_are_those_of_the_model(tmp_path):
    run = make_run(tmp_path / "a", likelihood="")
    model = VAE(latent_dim=2, hidden_dims=[3])
    model.save_pretrained(run)
    (table,) = tables(page_of([run], tmp_path)[0])
    count = sum(parameter.numel() for parameter in model.parameters())
    assert column(table, html_report.DEFINITIONS["parameters"].title) == [f"{count:,}"]


def test_folders_of_one_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run")]
    (table,) = tables(page_of([*runs, runs[0]], tmp_path)[0])
    assert column(table, "run") == ["x/run", "y/run"]


def test_the_page_does_not_tell_where_anything_lay(tmp_path):
    home = tmp_path / "home"
    runs = [make_run(home / name / "run", data=str(home / name / "cats"), data_root=str(home), lr=lr)
            for name, lr in (("x", 0.1), ("y", 0.2), ("z", 0.1))]  # fmt: skip
    page, notes = page_of(runs, tmp_path, sort="epochs")
    assert str(home) not in page
    # Folders of one name are not one set of data.
    assert [column(table, "run") for table in tables(page)] == [["x/run"], ["y/run"], ["z/run"]]
    assert "cats" in notes[0]
    other = make_run(home / "w" / "run", family="ddpm", weights=str(home / "weights.safetensors"))
    assert str(home) not in page_of([other, make_run(home / "v" / "run")], tmp_path)[0]


METRIC = {"value": 1.0, "low": 0.9, "high": 1.1, "n": 10}
LIKELIHOOD = {**METRIC, "kind": "elbo", "unit": "nats per image", "data": "grey pixels", "k": None}


def evaluated(name, remove=None, **changes):
    fields = {**(LIKELIHOOD if name == "elbo" else METRIC), **changes}
    fields.pop(remove, None)
    return {"metrics": {name: fields}}


@pytest.mark.parametrize(
    ("file", "damaged", "said"),
    [
        ("evaluation", evaluated("coverage", remove="low"), "a number, or null, for coverage.low, got none"),
        ("evaluation", evaluated("coverage", remove="n"), "a whole number for coverage.n, got none"),
        ("evaluation", evaluated("coverage", value="ten"), 'a number for coverage.value, got "ten"'),
        ("evaluation", evaluated("coverage", value=None), "a number for coverage.value, got null"),
        ("evaluation", evaluated("coverage", n="10"), 'a whole number for coverage.n, got "10"'),
        ("evaluation", evaluated("elbo", kind="evidence"), "one of elbo, iwae, bits_per_dim for elbo.kind, got"),
        ("evaluation", evaluated("elbo", kind=["elbo"]), "one of elbo, iwae, bits_per_dim for elbo.kind, got"),
        ("evaluation", evaluated("elbo", remove="unit"), "a text for elbo.unit, got none"),
        ("evaluation", evaluated("elbo", steps="all"), 'a whole number for elbo.steps, got "all"'),
        ("evaluation", {"metrics": {"coverage": 5}}, "an object for coverage, got 5"),
        ("evaluation", {"metrics": [1]}, "an object for metrics, got [1]"),
        ("evaluation", {"elbo": None}, "a number for elbo, got null"),
        ("evaluation", {"elbo": -9.0, "standard_error": "1"}, 'a number for standard_error, got "1"'),
        ("evaluation", {"binarize": ["none"]}, 'a text for binarize, got ["none"]'),
        ("history", {"epoch": "one"}, 'a number for epoch, got "one"'),
        ("history", {"warning": "collapse"}, "a number for epoch, got none"),
        ("history", {"epoch": 1, "seconds": "2"}, 'a number for seconds, got "2"'),
        ("settings", {"image_shape": 5}, "a list of whole numbers for image_shape, got 5"),
        ("settings", {"train_images": "many"}, 'a whole number for train_images, got "many"'),
        ("settings", {"data": ["digits"]}, 'a text for data, got ["digits"]'),
    ],
)
def test_damaged_files_are_named(file, damaged, said, tmp_path):
    of = {file: damaged}
    run = make_run(tmp_path / "a", evaluation=of.get("evaluation"), **of.get("settings", {}))
    if file == "history":
        (run / "metrics.jsonl").write_text(json.dumps(damaged) + "\n")
    name = {"evaluation": "evaluation.json", "history": "metrics.jsonl", "settings": "run.json"}[file]
    with pytest.raises(ValueError, match=re.escape(f"{run / name}: expected {said}")):
        page_of([run], tmp_path)


def test_what_is_no_run_is_refused(tmp_path, capsys):
    run = make_run(tmp_path / "experiment" / "runs" / "a")
    out = tmp_path / "report.html"
    assert "RUN: expected the folder of a run, got" in fails(capsys, "report", tmp_path / "nowhere", "--out", out)
    assert f"are in {run.parent}" in fails(capsys, "report", tmp_path / "experiment", "--out", out)
    assert "ends in .html" in fails(capsys, "report", run, "--out", tmp_path / "report.pdf")
    assert "--sort: expected one of epochs, family" in fails(capsys, "report", run, "--out", out, "--sort", "elbow")
    for name, text in (("evaluation.json", "{"), ("metrics.jsonl", "[1]\n")):
        before = (run / name).read_text() if (run / name).exists() else None
        (run / name).write_text(text)
        assert str(run / name) in fails(capsys, "report", run, "--out", out)
        (run / name).unlink() if before is None else (run / name).write_text(before)
    assert not out.exists()
    printed = succeeds(capsys, "report", run, make_run(tmp_path / "b", data="mnist"), "--out", out).splitlines()
    assert printed[-1] == str(out)
    assert "do not compare" in printed[0]


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # As root it has no sandbox, and a container's shared memory may be too small.
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def shown(browser, tmp_path_factory):
    """The page of five runs, open, and what the browser logged meanwhile."""
    folder = tmp_path_factory.mktemp("runs")
    for name, value in {"nine": 9.5, HOSTILE: 100.0, "ten": 10.5, "none": None, "near": 9.25}.items():
        make_run(folder / name, evaluation=value and frechet(value))
    (folder / "ten" / "metrics.jsonl").write_text('{"epoch": 1, "loss": 5.0, "test_loss": 6.0}\n')
    report.save_video(torch.rand(3, 4, 1, 8, 8), folder / "nine" / "reverse-0.mp4")
    page = folder / "report.html"
    names = ["nine", HOSTILE, "ten", "none", "near"]
    html_report.write_report([folder / name for name in names], page)
    browser.get_log("performance")
    browser.get(page.as_uri())
    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in requests if event["method"] == "Network.requestWillBeSent"]
    return browser, urls, browser.get_log("browser"), page


def names_in_order(driver):
    return [cell.text for cell in driver.find_elements("css selector", "table.sortable tbody th")]


def click(driver, heading):
    buttons = driver.find_elements("css selector", "table.sortable thead button")
    next(button for button in buttons if button.text == heading).click()
    return names_in_order(driver)


def test_a_click_sorts_numbers_as_numbers(shown):
    driver, *_ = shown
    title = html_report.DEFINITIONS["frechet_distance"].title
    assert click(driver, title) == ["near", "nine", "ten", HOSTILE, "none"]
    assert click(driver, title) == [HOSTILE, "ten", "nine", "near", "none"]
    headings = driver.find_elements("css selector", "table.sortable thead th")
    assert [each.get_attribute("aria-sort") for each in headings].count("descending") == 1
    assert click(driver, "run") == [HOSTILE, "near", "nine", "none", "ten"]
    assert click(driver, title) == ["near", "nine", "ten", HOSTILE, "none"]


def test_the_page_asks_for_nothing_and_complains_of_nothing(shown):
    driver, urls, log, page = shown
    assert page.as_uri() in urls
    assert {url for url in urls if not url.startswith("data:")} == {page.as_uri()}
    assert log == []
    assert driver.execute_script("return window.hacked === undefined && document.scripts.length === 1")


def test_no_other_script_runs_on_the_page(browser, tmp_path):
    """Even where a text were written unescaped: the policy knows the page's own script alone."""
    page, _ = page_of([make_run(tmp_path / "a")], tmp_path)
    attacks = "<script>window.hacked = 1</script><img src='data:,' onerror='window.hacked = 1'>"
    path = tmp_path / "attacked.html"
    path.write_text(page.replace("<h2>Runs</h2>", attacks))
    before = browser.current_window_handle
    browser.switch_to.new_window("tab")
    browser.get(path.as_uri())
    assert browser.execute_script("return document.scripts.length") == 2
    assert browser.execute_script("return window.hacked === undefined")
    refused = [entry["message"] for entry in browser.get_log("browser")]
    assert sum("Content Security Policy" in message for message in refused) == 2
    assert names_in_order(browser) == ["a"]
    click(browser, "run")
    headings = browser.find_elements("css selector", "table.sortable thead th")
    assert headings[0].get_attribute("aria-sort") == "ascending"
    browser.close()
    browser.switch_to.window(before)


def test_pictures_and_curves_are_there(shown):
    driver, *_ = shown
    widths = driver.execute_script("return [...document.images].map((image) => image.naturalWidth)")
    assert len(widths) == 5
    assert all(width > 0 for width in widths)
    video = driver.execute_async_script(
        "const done = arguments[0], video = document.querySelector('video');"
        "const tell = () => done([video.videoWidth, String(video.error && video.error.message)]);"
        "if (video.readyState > 0) tell(); else { video.onloadedmetadata = tell; video.onerror = tell; video.load(); }"
    )
    assert video[0] > 0, video
    assert driver.execute_script("return document.querySelectorAll('svg polyline.train').length") == 4
    assert driver.execute_script("return document.querySelectorAll('svg circle.test').length") == 1


def test_it_follows_the_system_into_the_dark(shown):
    driver, *_ = shown
    colours = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        script = "const style = getComputedStyle(document.body); return [style.backgroundColor, style.color]"
        colours[scheme] = [sum(map(int, re.findall(r"\d+", rgb)[:3])) for rgb in driver.execute_script(script)]
    assert colours["light"][0] > colours["light"][1] + 300
    assert colours["dark"][1] > colours["dark"][0] + 300


def test_headings_lead_to_the_runs(shown):
    driver, *_ = shown
    for link in driver.find_elements("css selector", "table.sortable tbody th a"):
        target = driver.find_element("css selector", link.get_attribute("href").partition("#")[2].join(("#", "")))
        assert target.text == link.text
