"""How a run's student does on single clips, computed by nothing of the training loop's."""

import numpy as np

from mmkd.cache_tools.cache.softmax import log_softmax
from mmkd.cache_tools.frames.clip_set import ClipVideo
from mmkd.cache_tools.views.canonical import canonical_view
from mmkd.cache_tools.views.drawing import evaluation_views
from mmkd.student.evaluation.trained import load_student


def measured(run, clip_set, clips):
    """Mean cross-entropy and top-1 on the one view in the middle of each clip that can be read."""
    student, nlls, right = load_student(run), [], []
    middle = student.policy.model_copy(update={"evaluation_clips": 1, "evaluation_crops": 1})
    for item in clip_set.probe(clips):
        if not isinstance(item, ClipVideo):
            continue
        (view,) = evaluation_views(item.facts, middle)
        frames = clip_set.source.read(item.clip.video, np.unique(view.frame_indices), item.video)
        logits = student.logits(canonical_view(frames, view, student.policy.size_px)[None])["action"][0]
        label = item.clip.labels["action"]
        nlls.append(-log_softmax(logits.astype(np.float64)[None])[0, label])
        right.append(logits.argmax() == label)
    return float(np.mean(nlls)), float(np.mean(right))
