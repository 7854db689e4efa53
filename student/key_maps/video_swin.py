"""Video Swin as its own repository, MMAction and the authors of the method name it, to torchvision's.

Liu et al., "Video Swin Transformer" (CVPR 2022). A layer of theirs is two entries of torchvision's `features`: its
blocks and the merging of patches behind them. MMAction 1.x puts `backbone.` before it and calls the classifier
`cls_head.fc_cls`; the authors of multimodal distillation keep one in `classifiers` for each label space.
"""

from mmkd.student.key_maps.key_map import KeyMap

LAYERS = 4


def renames() -> tuple[tuple[str, str], ...]:
    """Return the changes of names: layers, and the two linear layers of a block's perceptron."""
    layers = tuple(
        change
        for layer in range(LAYERS)
        for change in (
            (rf"^layers\.{layer}\.blocks\.", f"features.{2 * layer}."),
            (rf"^layers\.{layer}\.downsample\.", f"features.{2 * layer + 1}."),
        )
    )
    return (*layers, (r"\.mlp\.fc1\.", ".mlp.0."), (r"\.mlp\.fc2\.", ".mlp.3."))


VIDEO_SWIN = KeyMap(
    name="video-swin",
    source="Video Swin's own repository, MMAction, the authors of multimodal distillation",
    networks=("swin3d_t", "swin3d_s", "swin3d_b"),
    marks=(r"^layers\.0\.blocks\.0\.attn\.relative_position_bias_table$", r"^patch_embed\.proj\.weight$"),
    renames=renames(),
    classifier=r"^(cls_head\.fc_cls|classifiers\.(?P<head>\w+))\.(?P<part>weight|bias)$",
)
