"""The plain formulation, which the bench measures against: the maths of the released AllSpark code, and of the paper
where that is all there is, in ordinary calls of torch, PIL and numpy.

Its modules carry the names of ours, so that `plain_copy` can hand it our weights: same loss, same gradients, same
predictions (tests/unit/test_bench.py). It shares the draws of augmentation with the real code, and no pixel or tensor
work.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.random import Generator
from PIL import Image, ImageFilter, ImageOps
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import functional as TF

from allspark.config import DataConfig, ModelConfig, OptimConfig
from allspark.data.spec import IMAGENET, DatasetSpec, Sample
from allspark.data.transforms import draw_geometry
from allspark.evaluation.sliding_window import window_spans
from allspark.models.mit import HEADS, MLP_RATIO, REDUCTIONS, MiTSize
from allspark.models.segmentor import ENCODERS, Segmentor

Size = Sequence[int]


# The encoder: SegFormer (arXiv 2105.15203), section 3.1, on sequences of tokens


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, C), N = H * W."""
    return x.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, size: Size) -> Tensor:
    """(B, N, C) -> (B, C, H, W)."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *size)


def resize(x: Tensor, size: Size) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


class PatchEmbed(nn.Module):
    """(B, C_in, H, W) -> tokens (B, N, C) and the size of their map."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(channels, eps=1e-5)

    def forward(self, x: Tensor) -> tuple[Tensor, Size]:
        x = self.proj(x)
        return self.norm(to_tokens(x)), x.shape[-2:]


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V (eq. 1), K and V from a map reduced by a strided convolution (eq. 2)."""

    def __init__(self, channels: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads, self.reduction = heads, reduction
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        if reduction > 1:
            self.sr = nn.Conv2d(channels, channels, reduction, reduction)
            self.norm = nn.LayerNorm(channels, eps=1e-5)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        q = rearrange(self.q(x), "b n (head d) -> b head n d", head=self.heads)
        reduced = self.norm(to_tokens(self.sr(to_map(x, size)))) if self.reduction > 1 else x
        k, v = rearrange(self.kv(reduced), "b m (two head d) -> two b head m d", two=2, head=self.heads)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj(rearrange(weights @ v, "b head n d -> b n (head d)"))


class MixFFN(nn.Module):
    """MLP(GELU(Conv3x3(MLP(x)))) (eq. 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = MLP_RATIO * channels
        self.fc1 = nn.Linear(channels, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        return self.fc2(F.gelu(to_tokens(self.dwconv(to_map(self.fc1(x), size)))))


class Block(nn.Module):
    def __init__(self, channels: int, heads: int, reduction: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attn = Attention(channels, heads, reduction)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.ffn = MixFFN(channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        return x + self.drop_path(self.ffn(self.norm2(x), size))


class Stage(nn.Module):
    def __init__(self, in_channels: int, channels: int, index: int, drop_paths: Sequence[float]) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(in_channels, channels, *((7, 4) if index == 0 else (3, 2)))
        self.blocks = nn.ModuleList(Block(channels, HEADS[index], REDUCTIONS[index], rate) for rate in drop_paths)
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x, size = self.patch_embed(x)
        for block in self.blocks:
            x = block(x, size)
        return to_map(self.norm(x), size).contiguous()  # NCHW is what maps are handed on as


class Encoder(nn.Module):
    """image (B, 3, H, W) -> four maps, finest first."""

    def __init__(self, size: MiTSize, drop_path: float) -> None:
        super().__init__()
        rates = torch.linspace(0, drop_path, sum(size.depths)).split(size.depths)
        inputs = (3, *size.channels[:-1])
        self.stages = nn.ModuleList(
            Stage(inputs[i], size.channels[i], i, rates[i].tolist()) for i in range(len(size.channels))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class Decoder(nn.Module):
    """SegFormer's head (section 3.2): unify channels, resize, concatenate, fuse, classify."""

    def __init__(self, in_channels: Sequence[int], num_classes: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(size, channels) for size in in_channels)
        fuse = nn.Conv2d(len(in_channels) * channels, channels, 1, bias=False)
        self.fuse = nn.Sequential(OrderedDict(conv=fuse, bn=nn.BatchNorm2d(channels), relu=nn.ReLU()))
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        maps = [to_map(linear(to_tokens(c)), c.shape[-2:]) for linear, c in zip(self.linears, features, strict=True)]
        resized = [resize(x, features[0].shape[-2:]) for x in reversed(maps)]  # deepest first
        return self.classifier(self.dropout(self.fuse(torch.cat(resized, 1))))


# The bottleneck: AllSpark (arXiv 2403.01818), section 3


class Branch(nn.Module):
    """Projections of a branch, and channel attention: softmax(psi(q^T k)) v^T, psi an instance norm of the map."""

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(channels, heads * channels, bias=False) for _ in range(3))
        self.out = nn.Linear(heads * channels, channels, bias=False)
        self.dropout = nn.Dropout(dropout)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, maps, Cq, N), k and v (B, maps, Ck, N) -> (B, maps, Cq, N)."""
        return self.dropout(F.instance_norm(q @ k.transpose(-2, -1)).softmax(-1)) @ v

    def own(self, tokens: Tensor) -> Tensor:
        """Each image among its own channels, head by head: (B, N, C) -> (B, N, C)."""
        q, k, v = (
            rearrange(projection(tokens), "b n (head c) -> b head c n", head=self.heads)
            for projection in (self.q, self.k, self.v)
        )
        return self.dropout(self.out(rearrange(self.attend(q, k, v), "b head c n -> b n (c head)")))

    def cross(self, tokens: Tensor, context: Tensor) -> Tensor:
        """Each image (B, N, C) among the channels of all of the context (M, N, C): keys are repeated for each."""
        q = rearrange(self.q(tokens), "b n c -> b 1 c n")
        k, v = (
            rearrange(projection(context), "m n c -> 1 1 (m c) n").repeat(len(tokens), 1, 1, 1)
            for projection in (self.k, self.v)
        )
        return self.dropout(self.out(rearrange(self.attend(q, k, v), "b 1 c n -> b n c")))


class Memory(nn.Module):
    """queue (K, C, N): C slots per class; pointer (K,): the slot that is written next."""

    def __init__(self, num_classes: int, channels: int, side: int) -> None:
        super().__init__()
        self.register_buffer("queue", torch.randn(num_classes, channels, side * side))
        self.register_buffer("pointer", torch.zeros(num_classes, dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, features: Tensor, class_maps: Tensor) -> None:
        """Channels (B, C, N) into the rows of the class whose map is most like them, image by image, class by class."""
        side = round(features.shape[-1] ** 0.5)
        class_maps = F.normalize(resize(class_maps, (side, side)).flatten(2), dim=2)  # (B, K, N)
        similarity = class_maps @ F.normalize(features, dim=2).transpose(1, 2)  # (B, K, C)
        for channels, classes in zip(features, similarity.argmax(1), strict=True):
            for k in range(len(self.queue)):
                rows = channels[classes == k]
                first = int(self.pointer[k])
                slots = torch.arange(first, first + len(rows), device=rows.device) % self.queue.shape[1]
                self.queue[k, slots] = rows
                self.pointer[k] = (first + len(rows)) % self.queue.shape[1]


class Bottleneck(nn.Module):
    """(B, C, h, w) -> (B, C, h, w); a training batch is labeled images, then as many unlabeled ones."""

    def __init__(self, channels: int, num_heads: int, dropout: float, memory: Memory) -> None:
        super().__init__()
        self.map_in, self.map_out = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.norm_in, self.norm_out = nn.LayerNorm(channels, eps=1e-6), nn.LayerNorm(channels, eps=1e-6)
        self.cross_branch = Branch(channels, num_heads, dropout)
        self.self_branch = Branch(channels, num_heads, dropout)
        self.memory = memory

    def forward(self, feature: Tensor, class_maps: Tensor | None, read_memory: bool) -> Tensor:
        """In evaluation the batch is put twice, once for each branch, and what comes of the second is left."""
        batch, size = len(feature), feature.shape[-2:]
        if not self.training:
            feature = torch.cat((feature, feature))
        residual = to_tokens(F.gelu(self.map_in(feature)))
        labeled, unlabeled = self.norm_in(residual).chunk(2)
        if self.training:
            self.memory.enqueue(unlabeled.detach().transpose(1, 2), class_maps)
        context = self.memory.queue.transpose(1, 2) if self.training and read_memory else unlabeled
        attended = torch.cat((self.cross_branch.cross(labeled, context), self.self_branch.own(unlabeled)))
        return F.gelu(self.map_out(to_map(self.norm_out(attended + residual), size)))[:batch]


# The network and its step


class PlainSegmentor(nn.Module):
    """image (B, 3, H, W) -> logits (B, K, H, W)."""

    def __init__(self, encoder: Encoder, bottleneck: Bottleneck | None, decoder: Decoder) -> None:
        super().__init__()
        self.encoder, self.bottleneck, self.decoder = encoder, bottleneck, decoder

    def forward(self, image: Tensor, class_maps: Tensor | None = None, read_memory: bool = False) -> Tensor:
        features = self.encoder(image)
        if self.bottleneck is not None:
            features[-1] = self.bottleneck(features[-1], class_maps, read_memory)
        return resize(self.decoder(features), image.shape[-2:])


def plain_copy(model: Segmentor, cfg: ModelConfig) -> PlainSegmentor:
    """The plain network with the weights, memory and device of ours, which was built from cfg (MiT, MLP decoder)."""
    size: MiTSize = ENCODERS[cfg.encoder].args[0]
    num_classes, width = model.decoder.classifier.weight.shape[:2]
    bottleneck = None
    if model.bottleneck is not None:
        memory = Memory(num_classes, size.channels[-1], model.bottleneck.memory.size[0])
        bottleneck = Bottleneck(size.channels[-1], cfg.bottleneck.num_heads, cfg.bottleneck.dropout, memory)
    decoder = Decoder(size.channels, num_classes, width, cfg.dropout)
    plain = PlainSegmentor(Encoder(size, cfg.drop_path), bottleneck, decoder)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("memory.filled")}
    plain.load_state_dict(state)
    return plain.to(next(model.parameters()).device)


def plain_optimizer(cfg: OptimConfig, model: PlainSegmentor) -> torch.optim.SGD:
    """SGD as it comes, the encoder with lr and the rest with lr * lr_multi."""
    rest = [p for part in (model.bottleneck, model.decoder) if part is not None for p in part.parameters()]
    groups = [{"params": list(model.encoder.parameters())}, {"params": rest, "lr": cfg.lr * cfg.lr_multi}]
    return torch.optim.SGD(groups, cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay)


def plain_step(
    model: PlainSegmentor, optimizer: torch.optim.Optimizer, image_x: Tensor, mask: Tensor, image_u: Tensor
) -> float:
    """A step of AllSpark that reads the memory: images (B, 3, H, W) normalized, mask (B, H, W) int64 -> the loss."""
    model.eval()
    with torch.no_grad():
        class_maps = model(image_u)
        label = class_maps.argmax(1)
    model.train()
    logits_x, logits_u = model(torch.cat((image_x, image_u)), class_maps, read_memory=True).chunk(2)
    loss_x = F.cross_entropy(logits_x, mask, ignore_index=255)
    loss_u = F.cross_entropy(logits_u, label)
    loss = (loss_x + loss_u) / 2
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


# Data: resize the whole image, then crop it


class PlainStream(Dataset):
    """Training views by index, made in PIL and normalized in the worker, float32 (3, crop, crop).

    A labeled sample: a view and its mask (crop, crop) int64. An unlabeled one: a view and where it shows the image,
    (crop, crop) bool, by a mask of zeros that goes the same way. stream: of random numbers, as in data.loaders;
    strong: the view is the strong one, else the weak one.
    """

    def __init__(
        self, samples: Sequence[Sample], spec: DatasetSpec, data: DataConfig, seed: int, stream: int, strong: bool
    ) -> None:
        self.samples, self.spec, self.data, self.seed = samples, spec, data, seed
        self.stream, self.strong = stream, strong

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        sample, key = self.samples[index], (self.seed, 0, index, self.stream)
        image = Image.open(sample.image).convert("RGB")
        if sample.mask is None:
            mask = Image.new("L", image.size)
        else:
            mask = Image.fromarray(self.spec.decode_mask(np.array(Image.open(sample.mask))))
        image, mask = self.crop_of(image, mask, np.random.default_rng([*key, 0]))
        if self.strong:
            image = strong(image, np.random.default_rng([*key, 1]))
        mask = torch.from_numpy(np.array(mask))
        view = TF.normalize(TF.to_tensor(image), *IMAGENET)
        return view, mask != self.spec.ignore_index if sample.mask is None else mask.long()

    def crop_of(self, image: Image.Image, mask: Image.Image, rng: Generator) -> tuple[Image.Image, Image.Image]:
        crop = self.data.crop_size
        drawn = draw_geometry(rng, *image.size, crop, self.data.scale_range)
        (width, height), (left, top) = drawn.size, drawn.offset
        image = image.resize(drawn.size, Image.Resampling.BILINEAR)
        mask = mask.resize(drawn.size, Image.Resampling.NEAREST)
        border = (0, 0, max(crop - width, 0), max(crop - height, 0))
        image, mask = ImageOps.expand(image, border, 0), ImageOps.expand(mask, border, self.spec.ignore_index)
        window = (left, top, left + crop, top + crop)
        image, mask = image.crop(window), mask.crop(window)
        return (ImageOps.mirror(image), ImageOps.mirror(mask)) if drawn.flip else (image, mask)


def strong(image: Image.Image, rng: Generator) -> Image.Image:
    """Color jitter, grayscale and blur in PIL, drawn as by transforms.strong."""
    jitters, order = rng.random() < 0.8, rng.permutation(4)
    factors, hue = rng.uniform(0.5, 1.5, size=3), rng.uniform(-0.25, 0.25)
    greys, blurs, radius = rng.random() < 0.2, rng.random() < 0.5, rng.uniform(0.1, 2.0)
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    if jitters:
        for index in order:
            image = adjust[index](image, (*factors, hue)[index])
    if greys:
        image = TF.to_grayscale(image, num_output_channels=3)
    return image.filter(ImageFilter.GaussianBlur(radius)) if blurs else image


# Evaluation


@torch.no_grad()
def plain_label(model: PlainSegmentor, image: Tensor) -> Tensor:
    """Whole image (B, 3, H, W) -> classes (B, H, W)."""
    return model.eval()(image).argmax(1)


@torch.no_grad()
def plain_sliding(model: PlainSegmentor, image: Tensor, window: int, num_classes: int) -> Tensor:
    """Sum of the probabilities of windows, one at a time, 2/3 of a window apart: (1, 3, H, W) -> classes (1, H, W)."""
    model.eval()
    height, width = image.shape[-2:]
    total = image.new_zeros(len(image), num_classes, height, width)
    spans = [window_spans(length, window) for length in (height, width)]
    for rows in spans[0]:
        for columns in spans[1]:
            part = (..., slice(*rows), slice(*columns))
            total[part] += model(image[part]).softmax(1)
    return total.argmax(1)


def plain_counts(
    prediction: np.ndarray, mask: np.ndarray, num_classes: int, ignore_index: int
) -> tuple[np.ndarray, ...]:
    """Pixels per class of intersection, prediction and truth, (K,) each, by histograms of label maps (int64)."""
    prediction = np.where(mask == ignore_index, ignore_index, prediction)
    hits = prediction[prediction == mask]
    bins = np.arange(num_classes + 1)
    return tuple(np.histogram(values, bins)[0] for values in (hits, prediction, mask))
