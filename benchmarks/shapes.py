"""Shapes of normalized tensors, named after the models they come from: what is timed is what is
tested.

A tensor is a batch of examples with channels last. Batches differ by platform: what a GPU trains
with takes a CPU minutes, and what a CPU trains with does not fill a GPU.
"""

from typing import NamedTuple

NUM_GROUPS = 32
"""Groups of group and batch group norm: the default of the paper and of every library."""

NUM_GHOSTS = 4
"""Ghost batches of ghost batch norm."""


class Shape(NamedTuple):
    """The normalized tensor of a layer.

    `example` is the shape without the batch; `methods` are normalizations to measure there, named
    as in `jaxnorm.methods` without `_norm`; `num_groups` is for those that have groups.
    """

    name: str
    example: tuple[int, ...]
    cpu_batch: int
    gpu_batch: int
    methods: tuple[str, ...]
    num_groups: int = NUM_GROUPS

    def on(self, platform: str) -> tuple[int, ...]:
        """The shape of x on `platform`: `cpu`, or `gpu` and any other accelerator."""
        return (self.cpu_batch if platform == "cpu" else self.gpu_batch, *self.example)


_SHAPES = (
    Shape("resnet50_stem", (112, 112, 64), 8, 64, ("batch", "group", "instance")),
    Shape(
        "resnet50_stage1",
        (56, 56, 256),
        8,
        64,
        ("batch", "group", "instance", "batch_group", "ghost_batch"),
    ),
    Shape("resnet50_stage2", (28, 28, 512), 8, 64, ("batch", "group")),
    Shape(
        "resnet50_stage3", (14, 14, 1024), 8, 64, ("batch", "group", "batch_group", "ghost_batch")
    ),
    Shape("resnet50_stage4", (7, 7, 2048), 8, 64, ("batch", "group", "instance")),
    # first level of a U-Net for segmentation
    Shape("unet_top", (256, 256, 64), 1, 16, ("batch", "group", "instance")),
    # three levels of the U-Net of Stable Diffusion
    Shape("diffusion_64", (64, 64, 320), 2, 8, ("group",)),
    Shape("diffusion_32", (32, 32, 640), 2, 8, ("group",)),
    Shape("diffusion_16", (16, 16, 1280), 2, 8, ("group",)),
    Shape("cifar_unet", (32, 32, 128), 32, 128, ("group",)),  # U-Net of DDPM
    # feature pyramid of an 800 x 1216 image
    Shape("detector_p3", (100, 152, 256), 2, 2, ("batch", "group", "batch_group")),
    Shape("vit_b", (197, 768), 16, 64, ("token_layer",)),
    Shape("convnext_stage1", (56 * 56, 96), 8, 64, ("token_layer",)),  # pixels are its tokens
    Shape("convnext_stage4", (7 * 7, 768), 16, 64, ("token_layer",)),
)

SHAPES = {shape.name: shape for shape in _SHAPES}

QUICK = ("resnet50_stage1", "resnet50_stage3", "diffusion_32", "vit_b")
"""A subset of `SHAPES`."""

_EDGES = (
    Shape("mask", (256, 256, 1), 32, 256, ("batch",)),
    Shape("photos", (224, 224, 3), 8, 64, ("batch", "instance")),
    # rank 2, as in a perceptron
    Shape("mlp_512", (512,), 1024, 8192, ("batch", "group", "token_layer", "rms")),
    Shape("map_4x4", (4, 4, 1024), 16, 256, ("batch", "group", "instance")),
    Shape("map_1x1", (1, 1, 1024), 64, 256, ("batch", "group")),
    *(
        Shape(f"groups_{count}", (28, 28, 256), 8, 64, ("group",), num_groups=count)
        for count in (1, 2, 8)
    ),
    *(Shape(f"few_{c}", (64, c), 1, 1, ("token_layer", "rms")) for c in (8, 16, 64, 96, 768, 1024)),
    *(
        Shape(f"many_{c}", (rows, c), 16, 64, ("token_layer", "rms"))
        for c, rows in ((8, 8192), (16, 4096), (64, 2048), (96, 1024), (1024, 128))
    ),
    Shape("vit_b_rms", (197, 768), 16, 64, ("rms",)),
    Shape("heads_64", (12, 197, 64), 16, 64, ("token_layer", "rms")),  # queries of ViT-B, by head
)

EDGES = {shape.name: shape for shape in _EDGES}
"""Shapes at the edge of what layers meet, where ours may be slower than Flax's: one channel or few,
short sums, few rows, rank 2. Means over shapes do not contain them."""
