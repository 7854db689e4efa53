"""Files that have our networks' names: torchvision's own, those of its training programs, timm's, and ours."""

from mmkd.student.key_maps.key_map import KeyMap

SAME_NAMES = KeyMap(
    name="same",
    source="torchvision's weights and training programs, networks trained here",
    classifier=r"^(head|fc|classifier|head\.1|head\.fc|classifier\.1|heads\.(?P<head>\w+))\.(?P<part>weight|bias)$",
)
