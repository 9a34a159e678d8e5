"""Custom data sets: the report of `check`, suggested maps, the commands of the tutorial."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import train
from allspark.__main__ import main
from allspark.config import CustomDataConfig
from allspark.config_io import load_config
from allspark.data import audit
from allspark.data.datasets import spec_for
from allspark.data.datasets.custom import make_spec
from allspark.data.entries import read_list
from allspark.data.mask_io import read_mask
from allspark.data.spec import Sample
from allspark.data.splits import resolve
from allspark.data.survey import SampleReport
from allspark.utils.errors import UserError, run_main
from helpers import REPO

pytestmark = pytest.mark.usefixtures("one_thread")
SPLIT = ("1_1/labeled", "1_1/unlabeled")
TUTORIAL = REPO / "docs" / "own_data.md"


@pytest.fixture
def check(place, capsys):
    """(words) -> exit code, lines of stdout, the message."""
    place.edit(model={"encoder": "tiny", "bottleneck": "none"})
    recipe = yaml.safe_load(place.config.read_text())
    recipe["method"] = "supervised"
    place.config.write_text(yaml.safe_dump(recipe))

    def run(*words):
        capsys.readouterr()
        code = run_main(main, ["check", "--config", str(place.config), *map(str, words)])
        printed = capsys.readouterr()
        assert printed.err.count("\n") == (code != 0)
        return code, printed.out.splitlines(), printed.err

    return run


def masks_of(root):
    return sorted((root / "masks").rglob("*.png"))


def rewrite(path, change):
    with Image.open(path) as image:
        pixels = np.array(image)
    Image.fromarray(change(pixels)).save(path)


def test_check_reports_everything_at_once(check, place):
    root = place.root
    whole = (root / "images/labeled/labeled0.png").read_bytes()
    (root / "images/labeled/labeled0.png").write_bytes(whole[:200])
    (root / "masks/labeled/labeled1.png").unlink()
    rewrite(root / "masks/labeled/labeled2.png", lambda mask: np.where(mask == 2, 7, mask).astype(np.uint8))
    rewrite(root / "masks/val/val0.png", lambda mask: mask[:, 1:])
    (root / "images/unlabeled/unlabeled3.png").write_text("hello")
    shutil.copy(root / "images/labeled/labeled3.png", root / "images/val/val1.png")
    (root / "images/labeled/photo.heic").write_bytes(b"")
    code, out, err = check("model.pretrained=/no/weights.pth")
    assert any(line.startswith("WARNING: ") and "1 files without an image suffix are left out" in line for line in out)
    assert code == 2 and err.startswith("error: 6 problems, listed above; the first is: ")
    problems = [line for line in out if line.startswith("PROBLEM: ")]
    told = [
        r"masks/labeled/labeled1\.png: does not exist \(labeled\)",
        r"images/labeled/labeled0\.png: truncated",
        r"masks/val/val0\.png is 79 x 64; create the mask again",
        r"images/unlabeled/unlabeled3\.png: truncated or not an image",
        r"labeled2\.png: illegal mask values 7 \(\d+ pixels\).*tiny has classes 0\.\.2.*hold 0 \(\d+\.\d+%\), 1 ",
        r"/no/weights\.pth: no such weight file",
    ]
    assert len(problems) == len(told)
    for line, words in zip(problems, told, strict=True):
        assert re.search(words, line), line
    (copied,) = (line for line in out if "have a copy" in line)
    assert re.search(
        r"WARNING: 1 labeled images have a copy among the val images.*/labeled3\.png = .*/val1\.png", copied
    )


def test_copies_are_counted_once(tmp_path):
    images = [("labeled", "a"), *(("unlabeled", name) for name in "bcd"), ("unlabeled", "e")]
    reports = [
        SampleReport(kind, Sample(tmp_path / name), digest=b"1" if name < "e" else b"2") for kind, name in images
    ]
    (told,) = audit.find_copies(reports)
    assert told.startswith(f"1 labeled images have a copy among the unlabeled images, such as {tmp_path}/a = ")


def test_data_without_faults(check, place):
    rewrite(place.root / "masks/val/val0.png", lambda mask: np.where(mask == 2, 1, mask).astype(np.uint8))
    code, out, _ = check("batch_size=1", "--save-path", place.run / "not" / "there")
    assert code == 0 and out[-1] == "no problems found"
    text = "\n".join(out)
    assert re.search(r"tiny, split folders \([0-9a-f]{12}\): 4 labeled, 6 unlabeled, 2 val images", text)
    assert "labeled images: 80 x 64 pixels; 4 are smaller than the crop of 65 and get padded" in text
    rows = {line.split()[0]: line.split()[1:] for line in out if line.split()[0] in ("ground", "left", "right")}
    assert [row[0::2] for row in rows.values()] == [["4", "2"], ["4", "2"], ["4", "1"]]
    masks = np.concatenate([read_mask(p, SPEC).ravel() for p in sorted((place.root / "masks/labeled").glob("*"))])
    assert rows["left"][1] == f"{(masks == 1).sum() / (masks != 255).sum():.2%}"
    assert "a step has 1 labeled images; 6 steps per epoch, 12 in 2 epochs; learning rate 0.001, times 1 out" in text
    assert "batch_size is 2 in the recipe and 1 here, the learning rate 0.001 and 0.001; scaled with the batch" in text
    assert "(lr_scaling=linear) it would be 0.0005" in text
    assert "weights: none, tiny starts from random initialization (model.pretrained=FILE, see" in text
    assert "is low for random weights" not in text
    low = check("batch_size=1", "optim.name=adamw", "optim.lr=6e-5")[1]
    assert any(line.startswith("WARNING: the learning rate 6e-05 is low for random weights") for line in low)
    assert re.search(r"disk space at .*not/there: 4 checkpoints need up to 0\.\d+ GB, \d+\.\d+ GB are free", text)
    rewrite(place.root / "masks/val/val1.png", lambda mask: np.where(mask == 2, 1, mask).astype(np.uint8))
    told = "WARNING: classes that occur in no val image: right; their IoU is 0 if they are predicted anywhere"
    assert told not in text and told in "".join(check("--data-only")[1])


def test_regenerated_files_are_no_problem(check, place):
    """Illegal masks neither; but val is not skipped, nor a list of which nothing is left."""
    rewrite(place.root / "masks/labeled/labeled2.png", lambda mask: np.full_like(mask, 7))
    (place.root / "images/unlabeled/unlabeled3.png").write_text("hello")
    code, out, _ = check("data.on_bad_sample=skip", "--data-only")
    told = [line for line in out if line.startswith("WARNING: ") and "that training will replace: " in line]
    assert code == 0 and len(told) == 2 and "unlabeled3.png" in told[0] and "labeled2.png: illegal" in told[1]
    for path in (place.root / "images/unlabeled").iterdir():
        path.write_text("hello")
    (place.root / "images/val/val0.png").write_text("hello")
    code, out, _ = check("data.on_bad_sample=skip", "--data-only")
    assert code == 2 and sum(line.startswith("PROBLEM: ") for line in out) == 2 and "(and 5 more files)" in "".join(out)


SPEC = make_spec("tiny", CustomDataConfig(classes=("ground", "left", "right")))


def offered(message, key):
    """The map that the message says should be add to the config."""
    return yaml.safe_load(re.search(rf"add to the config.*?: data\.custom\.{key}: (\{{.*\}})", message)[1])


def test_binary_masks_0_255(check, place):
    for path in masks_of(place.root):
        rewrite(path, lambda mask: np.where(mask == 1, 255, 0).astype(np.uint8))
    two = "data.custom.classes=[ground, thing]"
    with pytest.raises(UserError, match="the labeled masks show no other class than ground, and ignored pixels"):
        train.main(place.train(two))
    code, _, err = check(two, "--data-only")
    assert code == 2 and "the labeled masks show no other class than ground" in err
    assert re.search(r"hold 0 \(\d\d\.\d+%\), 255 \(\d\d\.\d+%\)\. If 0 is ground, 255 is thing", err)
    assert (found := offered(err, "value_map")) == {0: 0, 255: 1}
    assert check(two, f"data.custom.value_map={found}", "--data-only")[0] == 0


def test_void_may_be_first_or_last(check, place):
    """Values 0..3 for three classes: 0 may be the void value, and 3 as well."""
    for path in masks_of(place.root):
        rewrite(path, lambda mask: np.where(mask == 255, 3, mask))
    code, _, err = check("--data-only")
    first, last = err.split("; if instead 3 is ignored, and 0 is ground: ")
    assert code == 2 and offered(first, "value_map") == {0: 255, 1: 0, 2: 1, 3: 2}
    assert yaml.safe_load(last) == {0: 0, 1: 1, 2: 2, 3: 255}
    assert check(f"data.custom.value_map={last.strip()}", "--data-only")[0] == 0


def test_color_masks(check, place):
    colors = np.zeros((256, 3), np.uint8)
    colors[[1, 2, 255]] = (200, 0, 0), (0, 90, 0), (255, 255, 255)
    before = {path: read_mask(path, SPEC) for path in masks_of(place.root)}
    for path in before:
        rewrite(path, lambda mask: colors[mask])
    code, _, err = check("--data-only")
    assert code == 2 and "found RGB" in err and "(and 5 more of 6 masks)" in err
    assert re.search(r"hold 0,0,0 \(\d+\.\d+%\), 0,90,0 \(.*\), 200,0,0 \(.*\), 255,255,255 \(\d\.\d+%\)\.", err)
    found = offered(err, "color_map")
    assert found == {"0,0,0": 0, "0,90,0": 1, "200,0,0": 2, "255,255,255": 255}
    right = {"0,90,0": 2, "0,0,0": 0, "200,0,0": 1, "255,255,255": 255}  # which is which only people know
    part = dict(list(right.items())[:2])
    assert offered(check(f"data.custom.color_map={part}", "--data-only")[2], "color_map") == right
    words = f"data.custom.color_map={right}"
    assert check(words, "--data-only")[0] == 0
    spec = spec_for(load_config(place.config, {"data.custom.color_map": right}).data)
    assert spec.palette == ((0, 0, 0), (200, 0, 0), (0, 90, 0))  # predictions look like the masks
    for path, mask in before.items():
        np.testing.assert_array_equal(read_mask(path, spec), mask)
    for path in masks_of(place.root)[:2]:
        rewrite(path, lambda mask: np.where(mask == 90, 91, mask))
    err = check(words, "--data-only")[2]
    assert re.search(r"illegal mask colors 0,91,0 \(\d+ pixels\); data.custom.color_map lists 0,0,0", err)
    assert "(and 1 more of 6 masks: labeled1.png)" in err
    assert offered(err, "color_map") == {**right, "0,91,0": 255}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"color_map": {"0,0,0": 0}, "value_map": {0: 0}}, "both value_map and color_map"),
        ({"color_map": {}}, "color_map: empty"),
        ({"color_map": {"0,0": 0}}, '"0,0" is not a color'),
        ({"color_map": {"0,0,256": 0}}, '"0,0,256" is not a color'),
        ({"color_map": {"1,2,3": 2}}, '"1,2,3": 2 is neither a class index 0..1 nor ignore_index 255'),
    ],
)
def test_invalid_color_map(options, told):
    with pytest.raises(UserError, match=told):
        make_spec("mine", CustomDataConfig(classes=("a", "b"), **options))


@pytest.mark.parametrize(
    ("values", "classes", "found"),
    [
        ([0, 255], 2, {0: 0, 255: 1}),
        ([1, 2, 3], 3, {1: 0, 2: 1, 3: 2}),
        ([0, 128, 255], 2, {0: 0, 128: 1, 255: 255}),
        ([0, 1, 2], 2, {0: 255, 1: 0, 2: 1}),
        ([0, 1, 254], 2, {0: 0, 1: 1, 254: 255}),
        ([0, 1, 2, 3, 7, 128], 4, {0: 0, 1: 1, 2: 2, 3: 3, 7: 255, 128: 255}),
        ([1, 2, 4], 2, None),
        ([7], 0, {7: 255}),
        ([7, 8], 0, None),
        (range(200), 2, None),
    ],
)
def test_suggested_value_map(values, classes, found):
    assert audit.guess_map(list(values), classes, colored=False) == found


def test_lossy_masks(check, place):
    for path in masks_of(place.root):
        rewrite(path, lambda mask: np.arange(mask.size, dtype=np.uint8).reshape(mask.shape))
    code, _, err = check("--data-only")
    assert code == 2 and "and 248 more" in err and "come from JPEG" in err and "add to the config" not in err


@pytest.mark.parametrize("suffix", [".tif", ".PNG"])
def test_mask_suffixes(place, suffix):
    for path in (place.root / "masks/labeled").glob("*.png"):
        with Image.open(path) as image:
            image.save(path.with_suffix(suffix))
        path.unlink()
    found = resolve(load_config(place.config).data).labeled
    assert [sample.mask.name for sample in found] == [f"labeled{index}{suffix}" for index in range(4)]


def test_linked_folders(place):
    """Also two that lead to one another, which end."""
    before = resolve(load_config(place.config).data)
    for kind in ("images", "masks"):
        (place.root / kind / "labeled").rename(place.root / f"{kind}_elsewhere")
        (place.root / kind / "labeled").mkdir()
        (place.root / kind / "labeled" / "deep").symlink_to(place.root / f"{kind}_elsewhere")
        (place.root / f"{kind}_elsewhere" / "back").symlink_to(place.root / kind / "labeled")
    after = resolve(load_config(place.config).data)
    assert [sample.image.name for sample in after.labeled] == [sample.image.name for sample in before.labeled]
    assert all(sample.mask.is_file() and sample.mask.parent.name == "deep" for sample in after.labeled)


def test_exif_rotated_photos(check, place):
    """An image that EXIF turns, and a mask that was drawn on it unturned: not a matter of size."""
    file = place.root / "images/labeled/labeled0.png"
    with Image.open(file) as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(file, exif=exif)
    code, _, told = check("--data-only")
    assert code == 2 and "labeled0.png is 64 x 80, " in told and "rotated by its EXIF orientation" in told
    with pytest.raises(UserError, match="the mask is not: .* set data.custom.orientation=stored; else rotate"):
        train.main(place.train())
    code, out, _ = check("--data-only", "data.custom.orientation=stored")
    assert code == 0 and any("1 of 12 images have an EXIF orientation, which is ignored" in line for line in out)


def test_names_do_not_command_the_terminal(check, place):
    for name in ("a\x1b[31m.png", "b\x1b]0;x\x07.png"):
        (place.root / "images/labeled" / name).write_bytes(b"no image")
    code, out, err = check("--data-only")
    text = "\n".join(out) + err
    assert code == 2 and r"a\x1b[31m.png" in text and "\x1b" not in text and "\x07" not in text


def test_recipe_completed_by_arguments(check, place):
    recipe = yaml.safe_load(place.config.read_text())
    del recipe["epochs"]
    place.config.write_text(yaml.safe_dump(recipe))
    assert check("--data-only")[0] == 2 and check("--data-only", "epochs=1", "warmup_epochs=0")[0] == 0


def test_schedule_that_swallows_the_run(check, place, capsys):
    """Refused by check and by train, before a file is touched; supervised training has no such schedule."""
    for words, told in (
        (["method=fixmatch", "burn_in_epochs=2"], "burn_in_epochs=2 and epochs=2: no unlabeled image is ever used"),
        (["evaluation.patience=1", "evaluation.interval=2"], "set at least evaluation.interval=2"),
        (
            ["method=allspark", "bottleneck=allspark", "warmup_epochs=1", "epochs=1"],
            "model.bottleneck.warmup_epochs=1 and epochs=1: the memory is never read",
        ),
        (
            ["method=allspark", "bottleneck=allspark", "warmup_epochs=0", "model.bottleneck.context=labeled"],
            "a memory that was never written would be read; set model.bottleneck.warmup_epochs above burn_in_epochs=0",
        ),
    ):
        code, _, err = check("--data-only", *words)
        assert code == 2 and told in err
        assert run_main(train.main, place.train(*words)) == 2 and told in capsys.readouterr().err
        assert not place.run.exists()
    assert check("--data-only", "method=allspark", "bottleneck=allspark", "warmup_epochs=null")[0] == 0
    assert check("--data-only", "burn_in_epochs=9")[0] == 0  # supervised


def test_allspark_without_bottleneck_is_self_training(check):
    code, out, _ = check("--data-only", "method=allspark")
    assert code == 0 and "method=allspark without a bottleneck is now method=selftrain" in out
    code, _, err = check("--data-only", "method=allspark_revised")
    assert code == 2 and "unknown method; choose one of supervised" in err
    assert "--method allspark_revised selects the recipe of that name, also together with --config FILE" in err


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("{}.jpg", "found labeled0.jpg, whose format may have changed the values: save masks as PNG"),
        ("{}_mask.png", "found labeled0_mask.png: a mask must have its image's name"),
        ("other_{}.png", "; add it, or correct the list, data.custom or data_root"),
    ],
)
def test_renamed_masks_hint(check, place, name, told):
    for path in list((place.root / "masks/labeled").glob("*.png")):
        with Image.open(path) as image:
            image.convert("L").save(path.with_name(name.format(path.stem)))
        path.unlink()
    code, _, err = check("--data-only")
    assert code == 2 and "labeled0.png: does not exist, nor does any other labeled mask (4)" in err and told in err
    with pytest.raises(UserError, match=re.escape(told)):
        resolve(load_config(place.config).data)
    if name == "{}_mask.png":  # files of several classes
        (place.root / "masks/labeled/labeled0_cell.png").touch()
        with pytest.raises(UserError, match=r"found labeled0_cell\.png, labeled0_mask\.png: .* masks per-class"):
            resolve(load_config(place.config).data)


def test_resume_with_value_map(place):
    """Its keys are numbers, in the recipe and in the checkpoint."""
    custom = yaml.safe_load(place.config.read_text(encoding="utf-8"))["data"]["custom"]
    place.edit(data={"custom": {**custom, "value_map": {0: 0, 1: 1, 2: 2}}})
    for _ in range(2):
        assert run_main(train.main, place.train("epochs=1", "warmup_epochs=0")) == 0


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", TUTORIAL.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_tutorial(tmp_path, monkeypatch, capsys):
    """Its data, its recipe, its checks and its lists; the training is the same as in every other test."""
    monkeypatch.chdir(tmp_path)
    exec(blocks("python")[0], {})
    first, second = (block for block in blocks("yaml"))
    commands = [line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    checks = [shlex.split(line)[3:] for line in commands if line.startswith("python -m allspark check")]
    (make,) = (shlex.split(line)[3:] for line in commands if line.startswith("python -m allspark splits make"))
    Path("blobs.yaml").write_text(first)
    assert run_main(main, [*checks[0], "--data-only"]) == 2
    printed = capsys.readouterr()
    assert "data.custom.value_map: {0: 0, 255: 1}" in printed.out
    value_map = re.search(r"value_map: \{.*?\}", printed.out)[0]
    assert value_map in second
    Path("blobs.yaml").write_text(second)
    main([*make, "--out", "lists"])
    assert "val.txt: 24 images" in capsys.readouterr().out
    lists = [f"--{kind}-id-path=lists/{words(checks[-1], '--split')}/{kind}.txt" for kind in ("labeled", "unlabeled")]
    main(["check", "--config", "blobs.yaml", "--data-only", *lists, "data.val_id_path=lists/val.txt"])
    assert capsys.readouterr().out.splitlines()[-1] == "no problems found"


def words(command, option):
    return command[command.index(option) + 1]


def test_labeled_and_unlabeled_folder(place, capsys, tmp_path):
    """The commonest layout, one folder of each and nothing to evaluate on: one command, and the recipe is complete."""
    recipe = yaml.safe_load(place.config.read_text(encoding="utf-8"))
    custom = recipe["data"]["custom"]
    del custom["val_images"], custom["val_masks"]
    text = yaml.safe_dump(recipe, sort_keys=False).replace("data:\n", "data:  # ours\n\n  # all photos\n")
    place.config.write_text(f"{text}# the end\n", encoding="utf-8")
    assert run_main(main, ["check", "--config", str(place.config), "--data-only"]) == 2
    assert "splits make --config FILE --val 1_5 --write-recipe" in capsys.readouterr().err
    make = ["splits", "make", "--config", str(place.config), "--val", "1_4", "--out", str(tmp_path / "lists")]
    main(make)
    shown = yaml.safe_load(capsys.readouterr().out.partition("add --write-recipe:\n")[2])
    main([*make, "--write-recipe"])  # the same lists
    main([*make, "--force", "--write-recipe"])  # again: the keys are replaced
    written = place.config.read_text(encoding="utf-8")
    assert yaml.safe_load(written) == {**recipe, "data": {**recipe["data"], **shown["data"]}}
    assert written.replace(yaml.safe_dump(shown).partition("\n")[2], "") == f"{text}# the end\n"
    lists = resolve(load_config(place.config).data)
    assert [len(lists.labeled), len(lists.unlabeled), len(lists.val)] == [3, 6, 1]
    assert not {sample.image for sample in lists.val} & {sample.image for sample in (*lists.labeled, *lists.unlabeled)}
    main([*make[:4], "--sizes", "2", "--out", str(tmp_path / "more")])  # later, without --val: val stays val
    more = [read_list(tmp_path / "more/2" / f"{kind}.txt", place.root) for kind in ("labeled", "unlabeled")]
    assert [len(part) for part in more] == [2, 7]
    assert lists.val[0].image not in {sample.image for part in more for sample in part}
    place.config.write_text(text.replace("data:  # ours", "'data':"), encoding="utf-8")
    assert run_main(main, [*make, "--force", "--write-recipe"]) == 2
    assert "cannot be edited; write below data: labeled_id_path: " in capsys.readouterr().err


def test_doubts_are_told(check, place):
    """Few steps, and masks of the next image."""
    lines = [f"images/labeled/x{i}.png masks/labeled/x{(i + 1) % 10}.png\n" for i in range(10)]
    for index in range(10):
        mask = np.zeros((64, 80), np.uint8)
        mask[8 + 4 * index :, 12 + 5 * index : 20 + 6 * index] = 1
        Image.fromarray(mask).save(place.root / f"masks/labeled/x{index}.png")
        Image.fromarray(np.repeat(200 * mask[..., None], 3, 2)).save(place.root / f"images/labeled/x{index}.png")
    (place.root / "shifted.txt").write_text("".join(lines))
    text = "\n".join(check("--data-only", f"data.labeled_id_path={place.root}/shifted.txt")[1])
    assert "WARNING: only 6 steps in all" in text and "is the list of masks shifted by one?" in text


def test_images_without_mask_are_unlabeled(place, capsys, tmp_path):
    """One folder of images, one of masks for some of them: then all of these may be labeled."""
    (place.root / "masks/labeled/labeled1.png").unlink()
    recipe = yaml.safe_load(place.config.read_text(encoding="utf-8"))
    del recipe["data"]["custom"]["unlabeled_images"]
    place.config.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    make = ["splits", "make", "--config", place.config, "--train", "images/labeled", "--masks", "masks/labeled"]
    main([*map(str, make), "--sizes", "3,1", "--out", str(tmp_path / "lists")])
    assert "1 images have no mask, such as " in capsys.readouterr().out
    labeled, unlabeled = ((tmp_path / f"lists/3/{kind}.txt").read_text() for kind in ("labeled", "unlabeled"))
    assert len(labeled.splitlines()) == 3 and unlabeled == "images/labeled/labeled1.png\n"
    assert (tmp_path / "lists/1/unlabeled.txt").read_text().splitlines()[-1] == "images/labeled/labeled1.png"
    main([*map(str, make), "--sizes", "1_1", "--val", "1_3", "--out", str(tmp_path / "val")])
    val, labeled, unlabeled = (read_list(tmp_path / "val" / f"{x}.txt", place.root) for x in ("val", *SPLIT))
    assert [len(val), len(labeled), len(unlabeled)] == [1, 2, 1] and not set(val) & set(labeled)
    for path in masks_of(place.root):
        rewrite(path, lambda mask: np.where(mask == 1, 255, 0).astype(np.uint8))
    assert run_main(main, [*map(str, make), "--sizes", "1", "--out", str(tmp_path / "none")]) == 2
    assert re.search("at most one of 3 classes, and ignored pixels.*allspark check", capsys.readouterr().err)
