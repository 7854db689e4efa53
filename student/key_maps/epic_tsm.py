"""Temporal shift on a 2D ResNet as its authors and EPIC-KITCHENS-100's baselines name it, to ours.

Lin et al., "TSM" (ICCV 2019). A shifted convolution is wrapped in a module called `net`. EPIC's baselines classify
verbs and nouns by one layer: 97 rows of verbs, then 300 of nouns.
"""

from mmkd.student.key_maps.key_map import KeyMap

EPIC_TSM = KeyMap(
    name="tsm",
    source="TSM and EPIC-KITCHENS-100's baselines",
    networks=("tsm_resnet50",),
    marks=(r"^base_model\.layer1\.0\.conv1\.net\.weight$",),
    renames=((r"^base_model\.", ""), (r"\.conv1\.net\.", ".conv1.")),
    classifier=r"^(new_fc|base_model\.fc)\.(?P<part>weight|bias)$",
    rows={97 + 300: {"verb": 97, "noun": 300}},
)
