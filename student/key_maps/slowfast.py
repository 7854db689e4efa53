"""SlowFast's two-pathway ResNets, as EPIC-KITCHENS-100's baseline is published: classifiers of verbs and nouns.

Feichtenhofer et al., "SlowFast Networks" (ICCV 2019). We have no such network: the map keeps the names of its
own class, which is given as `module:factory`, and tells the classifiers of the heads apart.
"""

from mmkd.student.key_maps.key_map import KeyMap

SLOWFAST = KeyMap(
    name="slowfast",
    source="SlowFast and EPIC-KITCHENS-100's baseline",
    marks=(r"^s1\.pathway0_stem\.conv\.weight$", r"^s1_fuse\.conv_f2s\.weight$"),
    classifier=r"^head\.projection(_(?P<head>\w+))?\.(?P<part>weight|bias)$",
)
