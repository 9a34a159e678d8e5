"""`allspark report`: contents of the page, refusals, and the page in a browser."""

import io
import json
import re
import shutil
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from allspark.__main__ import main
from allspark.cli import report
from allspark.config_io import merge
from allspark.data.spec import DatasetSpec, voc_palette
from allspark.runs import named_folders, read_run
from allspark.utils.errors import UserError
from allspark.utils.processor import cpu_name
from allspark.visualization.best_worst import BestWorst, encode_image

CLASSES = ["ground", "left", "right"]
NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def content(page: Path) -> dict:
    """The JSON inside the page, as a browser reads it: up to the first end of a script."""
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script', text, re.DOTALL)[1])


@pytest.fixture
def second(finished, tmp_path):
    """Another run: the finished one's checkpoint, a recipe that differs in two keys, and a log of its own."""
    folder = tmp_path / "second"
    shutil.copytree(finished.run, folder, ignore=shutil.ignore_patterns("*.pth"))
    (folder / "latest.pth").symlink_to(finished.run / "latest.pth")
    recipe = yaml.safe_load((folder / "config.yaml").read_text())
    recipe = merge(recipe, {"seed": 7, "optim": {"lr": 0.5}, "log": {"interval": 99}})  # the last changes no result
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def page(finished, tmp_path_factory):
    """The page of the finished run, under two names; the second one's log says other classes."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(finished.run, folder / "other")
    out = folder / "deep" / "page.html"
    main(["report", f"mine={finished.run}", str(folder / "other"), "--out", str(out), "--device", "cpu", "--best"])
    for file in folder.rglob("*.pth"):
        file.unlink()
    return out


def test_page_contents(page, finished, read_metrics):
    found, (steps, evaluations) = content(page), read_metrics(finished.run)
    best = max(evaluations, key=lambda line: line["miou"])
    mine, other = found["runs"]
    assert (mine["name"], other["name"], found["classes"], found["notes"]) == ("mine", "other", CLASSES, [])
    assert mine["iou"] == pytest.approx(list(best["iou"].values()), abs=1e-3)  # evaluated again: the same
    assert mine["facts"]["mIoU, last epoch"] == f"{evaluations[-1]['miou']:.2f}"
    assert mine["facts"]["mIoU, best epoch"].startswith(f"{best['miou']:.2f} (epoch {best['epoch'] + 1};")
    assert re.match(r"folders of the recipe|own|.* sha256 [0-9a-f]{12}", mine["facts"]["split"])
    batch = yaml.safe_load((finished.run / "config.yaml").read_text())["batch_size"]
    spent, before = 0.0, 0
    for line in steps:
        spent, before = spent + (line["step"] - before) * batch / line["images_per_s"], line["step"]
    assert mine["facts"]["time"].startswith(f"{timedelta(seconds=round(spent))} by its logged speed")
    assert "sha256" in mine["facts"]["split"] and f"process(es) on {cpu_name()}" in mine["facts"]["device"]
    assert mine["curves"]["miou"]["values"] == pytest.approx([line["miou"] for line in evaluations], abs=1e-3)
    assert mine["curves"]["lr"]["steps"] == [line["step"] for line in steps]
    assert {"loss", "loss_x", "loss_u"} <= set(mine["curves"])
    masks = [np.asarray(Image.open(path)) for path in sorted((finished.root / "masks/val").iterdir())]
    counts = np.bincount(np.concatenate([mask.ravel() for mask in masks]), minlength=256)[:3]
    assert np.array(mine["confusion"]).sum(1).tolist() == counts.tolist()
    assert found["differences"] == []
    (worst,), (top,) = found["examples"]["worst"], found["examples"]["best"]
    assert {worst["name"], top["name"]} == {"val0", "val1"} and worst["miou"] <= top["miou"]
    assert worst["size"] == [80, 64] and worst["image"].startswith("data:image/jpeg;base64,")


def test_page_fetches_nothing(page):
    text = page.read_text(encoding="ascii")
    assert "default-src 'none'" in text and re.search(r"script-src 'sha256-[\w+/]{43}='", text)
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"@import|\burl\(|<link[^>]+stylesheet|<script[^>]+src|fetch\(|XMLHttpRequest", text)


def test_recipe_differences(finished, second, tmp_path):
    out = tmp_path / "page.html"
    main(["report", str(finished.run), str(second), "--out", str(out), "--no-images"])
    found = content(out)
    assert found["differences"] == [["optim.lr", ["0.001", "0.5"]], ["seed", ["0", "7"]]]
    assert [run["name"] for run in found["runs"]] == ["run", "second"]
    assert [run["confusion"] for run in found["runs"]] == [None, None]
    last = json.loads((second / "metrics.jsonl").read_text().splitlines()[-1])["iou"]
    assert found["runs"][0]["iou"] == pytest.approx(list(last.values()), abs=1e-3)
    assert found["examples"] == {"worst": [], "best": []}


def test_page_without_data_or_checkpoint(second, tmp_path):
    (second / "latest.pth").unlink()
    recipe = yaml.safe_load((second / "config.yaml").read_text())
    recipe["data"]["data_root"] = str(tmp_path / "gone")
    (second / "config.yaml").write_text(yaml.safe_dump(recipe))
    with open(second / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "epoch": 2, "mio')  # the run died here
    main(["report", str(second), "--out", str(tmp_path / "page.html"), "--no-images"])
    facts = content(tmp_path / "page.html")["runs"][0]["facts"]
    assert (
        facts["split"].startswith("folders, labeled list sha256 ")
        and f"1 process(es) on {cpu_name()}" in facts["device"]
    )
    (second / "run.json").unlink()  # as in a run that is older than it
    main(["report", str(second), "--out", str(tmp_path / "page.html"), "--no-images"])
    facts = content(tmp_path / "page.html")["runs"][0]["facts"]
    assert facts["split"].endswith("hash unknown") and facts["device"].startswith("unknown")


def rename_class(folder: Path, new: str) -> None:
    recipe = yaml.safe_load((folder / "config.yaml").read_text())
    recipe["data"]["custom"]["classes"][1] = new
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "iou" in line:
            line["iou"][new] = line["iou"].pop("left")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_names_are_escaped(second, tmp_path):
    rename_class(second, NASTY)
    main(
        ["report", f"</script><script>alert(3)</script>={second}", "--out", str(tmp_path / "page.html"), "--no-images"]
    )
    text = (tmp_path / "page.html").read_text()
    assert text.count("<script") == text.count("</script") == 2 and "<img" not in text
    found = content(tmp_path / "page.html")
    assert found["classes"][1] == NASTY and found["runs"][0]["iou"][1] is not None


def test_inconsistent_numbers_are_reported(second, tmp_path, capsys):
    lines = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "miou" in line:
            line["miou"] += 5
    (second / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    main(["report", str(second), "--out", str(tmp_path / "page.html"), "--device", "cpu", "--images", "1"])
    notes = " ".join(content(tmp_path / "page.html")["notes"])
    assert "second is not finished: 1 of 2 epochs are evaluated" in notes and notes in capsys.readouterr().err.replace(
        "\nWARNING: ", " "
    )


def ruin(folder: Path, what: str) -> None:
    """Damage a run in the way that `what` names."""
    if what == "no checkpoint":
        (folder / "latest.pth").unlink()
    elif what == "no config":
        (folder / "config.yaml").unlink()
    elif what == "no data":
        recipe = yaml.safe_load((folder / "config.yaml").read_text())
        recipe["data"]["data_root"] = "/nowhere/at/all"
        (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    elif what == "bytes":
        (folder / "metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    else:
        (folder / "metrics.jsonl").write_text(what + "\n")


EVALUATION = '{"step": 3, "epoch": 0, "miou": 20.0, "iou": {"left": %s}}'


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("no checkpoint", r"latest\.pth: no such checkpoint.*--no-images"),
        ("no config", r"config\.yaml.*cannot be read"),
        ("bytes", r"metrics\.jsonl: not a text file"),
        ("", r"no evaluation yet"),
        (
            '{"step": "one", "loss": 2.0}\n' + EVALUATION % "1.0",
            r"metrics\.jsonl, line 1: not a line that train\.py writes.*one",
        ),
        (EVALUATION % '"high"', r"metrics\.jsonl, line 1: not a line that train\.py writes.*remove the line"),
    ],
)
def test_damaged_run(second, tmp_path, what, told):
    ruin(second, what)
    with pytest.raises(UserError, match=told):
        main(["report", str(second), "--out", str(tmp_path / "page.html"), "--device", "cpu"])
    assert not (tmp_path / "page.html").exists()


def test_bad_arguments(finished, second, tmp_path):
    out = str(tmp_path / "page.html")
    with pytest.raises(UserError, match=r"nowhere: not the folder of a run"):
        main(["report", str(tmp_path / "nowhere"), "--out", out])
    with pytest.raises(UserError, match=r"is not a folder.*--no-images"):
        main(["report", str(finished.run), "--out", out, "--data-root", str(tmp_path / "gone"), "--device", "cpu"])
    with pytest.raises(UserError, match=r"two runs have the name x; .*name=FOLDER"):
        main(["report", f"x={finished.run}", f"x={second}", "--out", out])
    weights = tmp_path / "best.pth"
    weights.write_bytes(b"precious")
    with pytest.raises(UserError, match=r"best\.pth: must be a file whose name ends in \.html"):
        main(["report", str(finished.run), "--out", str(weights)])
    assert weights.read_bytes() == b"precious"
    with pytest.raises(UserError, match=r"--images 101: give at most 100"):
        main(["report", str(finished.run), "--out", out, "--images", "101"])
    rename_class(second, "elsewhere")
    with pytest.raises(UserError, match=r"cannot be compared"):
        main(["report", str(finished.run), str(second), "--out", out, "--no-images"])


def test_equal_folder_names():
    folders = ["/a/x/seed_0", "/a/y/seed_0"]
    assert [name for name, _ in named_folders(folders)] == ["x/seed_0", "y/seed_0"]
    assert [name for name, _ in named_folders(["/a/x", "mine=/a/y"])] == ["x", "mine"]
    assert [name for name, _ in named_folders(["/a/x", "/a/x"])] == ["x", "x"]


SPEC = DatasetSpec("any", ("a", "b", "c"), voc_palette(3))


def scored(count: int, images: int) -> tuple[BestWorst, list[float]]:
    """Extremes of images whose share of wrong pixels differs, in a shuffled order, and that share of each."""
    extremes, wrong = BestWorst(SPEC, count, side=20), np.random.default_rng(0).permutation(images) / images
    for index, share in enumerate(wrong):
        mask = torch.zeros(32, 40, dtype=torch.uint8)
        mask[:, 20:], mask[0] = 1, 255
        prediction = mask.masked_fill(mask == 255, 2)
        prediction[: 1 + round(31 * share)] = 2
        prediction[:, 0] = 255  # outside the center crop
        extremes(f"{index:02}", torch.zeros(3, 32, 40, dtype=torch.uint8), mask, prediction)
    return extremes, wrong.tolist()


def test_best_and_worst_of_many():
    extremes, wrong = scored(3, 17)
    order = [f"{index:02}" for index in np.argsort(wrong)]
    assert [one.name for one in extremes.best] == order[:3]
    assert [one.name for one in extremes.worst] == order[::-1][:3]
    assert extremes.confusion.matrix.sum() == 17 * 31 * 39  # neither ignored pixels nor those outside the crop
    assert extremes.best[0].iou[:2] == (100.0, 100.0) and extremes.best[0].image.size == (20, 16)
    mask = np.asarray(extremes.best[0].truth)
    assert set(np.unique(mask)) <= {0, 1, 255} and mask.shape == (16, 20)  # no class from between two others
    with Image.open(io.BytesIO(encode_image(extremes.best[0].truth, "PNG"))) as stored:
        assert stored.format == "PNG"
        opaque = np.asarray(stored.convert("RGBA"))[..., 3] > 0
    assert SPEC.palette[0] == (0, 0, 0)
    np.testing.assert_array_equal(opaque, mask != 0)  # the black class leaves the photo as it is


def test_best_and_worst_of_few():
    extremes, _ = scored(8, 3)
    assert (len(extremes.worst), len(extremes.best)) == (1, 2)
    assert scored(0, 3)[0].best == [] and scored(0, 3)[0].confusion.matrix.sum() == 3 * 31 * 39


def test_page_size_limit(finished, tmp_path):
    entry = report.read_entries([str(finished.run)])[0]
    whole, told = report.page_within(10**7, [entry], [])
    assert told == []
    extremes = scored(8, 17)[0]
    entry.evaluated = report.Evaluated(
        extremes.confusion.result(17), extremes, "whole", {"step": 6, "sha256": "0" * 64, "split": {}}
    )
    limit = len(whole) + 6000
    text, (note,) = report.page_within(limit, [entry], [])
    assert len(text) <= limit and re.match(r"\d+ of 16 images are on the page", note)
    (tmp_path / "page.html").write_text(text)
    found = content(tmp_path / "page.html")
    assert found["notes"] == [note] and 0 < len(found["examples"]["best"]) < 8


def test_long_logs_are_averaged(finished):
    run = read_run(finished.run)
    run.lines[:] = [{"step": step, "epoch": 0, "loss": float(step % 2)} for step in range(1, 2001)] + run.lines
    curve = report.curves(run)["loss"]
    assert (
        len(curve["steps"]) <= report.MAX_POINTS and curve["each"] > 1 and set(curve["values"][:300]) <= {0.4, 0.6, 0.5}
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Debian's chromium without a window; nothing is downloaded."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("no browser to try the page in: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    profile = f"--user-data-dir={tmp_path_factory.mktemp('profile')}"
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900", profile):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


def test_page_in_browser(browser, page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def all_of(selector):
        return browser.find_elements("css selector", selector)

    def classes():
        return [cell.text for cell in all_of(".classes tbody th")]

    def shown_iou():
        return [float(row.find_element("css selector", ".number").text) for row in all_of(".classes tbody tr")]

    browser.get(page.as_uri())
    assert browser.get_log("browser") == []
    assert len(all_of(".panel")) >= 4 and len(all_of(".card")) == 2 and len(all_of(".matrix tbody tr")) == 3
    assert all(picture.get_property("naturalWidth") == 80 for picture in all_of(".card img"))
    assert all(picture.get_attribute("alt") for picture in all_of(".card img"))

    assert classes() == CLASSES
    all_of(".classes thead button")[0].click()
    assert classes() == CLASSES[::-1]
    all_of(".classes thead button")[1].click()  # IoU, highest first
    iou = [round(value, 1) for value in content(page)["runs"][0]["iou"]]
    assert shown_iou() == sorted(iou, reverse=True)
    browser.switch_to.active_element.send_keys(Keys.ENTER)  # the head keeps the focus
    assert shown_iou() == sorted(iou) and len(set(iou)) > 1
    assert all_of(".classes thead th")[1].get_attribute("aria-sort") == "ascending"

    slider, truth, prediction = all_of(".card input")[0], *all_of(".card img.mask")[:2]
    before = [layer.value_of_css_property("clip-path") for layer in (truth, prediction)]
    slider.send_keys(Keys.HOME)
    assert truth.value_of_css_property("clip-path") == "inset(0px 100% 0px 0%)"  # nothing of it: the image is seen
    slider.send_keys(Keys.END)
    assert (
        prediction.value_of_css_property("clip-path") == "inset(0px 0% 0px 0px)"
        and slider.get_attribute("value") == "200"
    )
    assert slider.get_attribute("aria-valuetext") == "prediction"
    stage = all_of(".card .stage")[0]
    ActionChains(browser).move_to_element(stage).click_and_hold().move_by_offset(5, 0).release().perform()
    after = [layer.value_of_css_property("clip-path") for layer in (truth, prediction)]
    assert 150 <= int(slider.get_attribute("value")) <= 160 and after != before

    panel = all_of(".panel svg")[0]
    ActionChains(browser).move_to_element(panel).perform()
    assert "step" in all_of(".panel .readout")[0].text
    cell = all_of(".matrix tbody td")[0]
    cell.send_keys(Keys.ARROW_RIGHT)
    assert browser.switch_to.active_element == all_of(".matrix tbody td")[1]
    assert "of ground is predicted as left" in all_of("#confusion .readout")[0].text
    assert browser.get_log("browser") == []


def test_hostile_name_in_browser(browser, second, tmp_path):
    rename_class(second, NASTY)
    main(["report", str(second), "--out", str(tmp_path / "page.html"), "--no-images"])
    browser.get((tmp_path / "page.html").as_uri())
    assert browser.get_log("browser") == []  # an alert or a failed image would be there
    assert NASTY in [cell.text for cell in browser.find_elements("css selector", ".classes tbody th")]
