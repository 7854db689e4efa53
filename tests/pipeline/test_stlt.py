import pytest
import torch

from mmkd.data_manifests.errors import InputError
from mmkd.pipeline.experts.stlt import STLT

TINY = {"hidden": 32, "attention_heads": 2, "spatial_layers": 2, "temporal_layers": 2, "dropout": 0.1}


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def network():
    return STLT({"verb": 5, "noun": 3}, **TINY).eval()


def layout(batch=2, frames=4, boxes=5, empty=(3, 4)):
    corners = torch.rand(batch, frames, boxes, 4).sort(dim=-1).values
    categories = torch.randint(1, 3, (batch, frames, boxes))
    categories[:, :, list(empty)] = 0
    return {
        "boxes": torch.where(categories[..., None] > 0, corners, 0),
        "categories": categories,
        "scores": torch.where(categories > 0, torch.rand(batch, frames, boxes), 0),
    }


def assert_same(first, second):
    for head in first:
        torch.testing.assert_close(first[head], second[head], atol=1e-5, rtol=1e-5)


def test_logits_per_head_are_float32(network):
    logits = network(layout())
    assert {head: (value.shape, value.dtype) for head, value in logits.items()} == {
        "verb": ((2, 5), torch.float32),
        "noun": ((2, 3), torch.float32),
    }


def test_logits_are_float32_under_autocast(network):
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(layout())
    assert all(value.dtype == torch.float32 for value in logits.values())


def test_order_of_the_boxes_of_a_frame_does_not_matter(network):
    inputs = layout()
    order = torch.stack([torch.randperm(5) for _ in range(8)]).view(2, 4, 5)
    shuffled = {
        "boxes": inputs["boxes"].gather(2, order[..., None].expand(-1, -1, -1, 4)),
        "categories": inputs["categories"].gather(2, order),
        "scores": inputs["scores"].gather(2, order),
    }
    assert not torch.equal(shuffled["boxes"], inputs["boxes"])
    assert_same(network(inputs), network(shuffled))


@pytest.mark.parametrize("name", ["boxes", "scores"])
@pytest.mark.parametrize("value", [float("nan"), 7.0])
def test_content_and_number_of_empty_slots_do_not_matter(network, name, value):
    inputs = layout()
    expected = network(inputs)
    dirty = inputs | {name: inputs[name].clone()}
    dirty[name][:, :, 3:] = value
    assert_same(network(dirty), expected)
    assert_same(network({name: array[:, :, :3] for name, array in inputs.items()}), expected)


def test_a_frame_sees_itself_and_earlier_frames_alone(network):
    inputs = layout()
    changed = {name: array.clone() for name, array in inputs.items()}
    changed["boxes"][:, 2, 0] = torch.rand(2, 4)
    before = network.encode_frames(network.encode_layouts(inputs))
    after = network.encode_frames(network.encode_layouts(changed))
    torch.testing.assert_close(before[:, :2], after[:, :2], atol=1e-6, rtol=0)
    assert ((before - after)[:, 2:].abs().amax(dim=(0, 2)) > 1e-4).all()  # frames 2, 3 and the CLS token


@pytest.mark.parametrize("change", ["boxes", "categories", "scores", "order of frames"])
def test_what_should_matter_does(network, change):
    inputs = layout()
    changed = {name: array.clone() for name, array in inputs.items()}
    if change == "order of frames":
        changed = {name: array.flip(1) for name, array in changed.items()}
    elif change == "categories":
        changed[change][:, :, 0] = 3 - changed[change][:, :, 0]
    else:
        changed[change][:, :, 0] = 1 - changed[change][:, :, 0]
    assert (network(inputs)["verb"] - network(changed)["verb"]).abs().max() > 1e-3


def test_absent_scores_mean_one(network):
    inputs = layout()
    ones = inputs | {"scores": torch.ones_like(inputs["scores"])}
    del inputs["scores"]
    assert_same(network(inputs), network(ones))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("slots", [0, 3])
def test_nothing_annotated_gives_finite_logits_and_gradients(network, training, slots):
    network.train(training)
    inputs = {name: array[:, :, :slots] * 0 for name, array in layout().items()}
    logits = network(inputs)
    assert all(value.isfinite().all() for value in logits.values())
    sum(value.square().sum() for value in logits.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_inference_mode_gives_the_same_logits(network):
    inputs = layout()
    expected = network(inputs)  # with gradients, so without PyTorch's fused inference path
    with torch.inference_mode():
        assert_same(network(inputs), expected)


def test_gradient_reaches_every_parameter(network):
    logits = network.train()(layout())
    sum(value.square().sum() for value in logits.values()).backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
    assert not network.embedding.category.weight.grad[0].any()  # an empty slot teaches nothing


def test_layers_start_from_different_weights(network):
    first, second = network.spatial
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


def test_bad_sizes_are_refused(network):
    with pytest.raises(InputError, match="hidden 32 is not a multiple of attention_heads 5"):
        STLT({"action": 2}, **TINY | {"attention_heads": 5})
    small = STLT({"action": 2}, **TINY, max_frames=3)
    with pytest.raises(InputError, match="4 frames, but positions exist for 3 only"):
        small(layout())


def test_default_size_is_the_published_one():
    with torch.device("meta"):
        network = STLT({"action": 174})
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == 85


def moving_boxes(count, generator):
    """Boxes that move left or right (label 0 or 1), or whose hand moves while the object stays (2)."""
    labels = torch.randint(0, 3, (count,), generator=generator)
    start = 0.3 + 0.2 * torch.rand(count, 1, generator=generator)
    direction = torch.tensor([-1.0, 1.0, 1.0])[labels][:, None]
    x = start + direction * torch.linspace(0, 0.25, 8)
    hand = torch.stack([x, x * 0 + 0.4, x + 0.1, x * 0 + 0.6], dim=-1)
    still = torch.where(labels[:, None] == 2, start.expand(-1, 8), x)
    thing = torch.stack([still + 0.1, x * 0 + 0.4, still + 0.25, x * 0 + 0.6], dim=-1)
    boxes = torch.stack([hand, thing, torch.zeros_like(hand)], dim=2)
    return {"boxes": boxes, "categories": torch.tensor([1, 2, 0]).expand(count, 8, 3)}, labels


def test_a_tiny_network_learns_motion_in_seconds():
    generator = torch.Generator().manual_seed(1)
    network = STLT({"action": 3}, **TINY | {"dropout": 0.0})
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for _ in range(200):
        inputs, labels = moving_boxes(32, generator)
        loss = torch.nn.functional.cross_entropy(network(inputs)["action"], labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    inputs, labels = moving_boxes(256, generator)
    with torch.inference_mode():
        correct = network.eval()(inputs)["action"].argmax(1) == labels
    assert correct.float().mean() > 0.95


def test_what_experts_of_before_hold_and_give_is_unchanged():
    """The same names, sizes and draws; the logits are those of the version before `norm_eps`, `sides`, `states`."""
    torch.manual_seed(3)
    network = STLT({"action": 2}, **TINY).eval()
    assert [name for name in network.state_dict() if name.startswith("embedding.")] == [
        *("embedding.category.weight", "embedding.box.weight", "embedding.box.bias"),
        *("embedding.score.weight", "embedding.score.bias", "embedding.norm.weight", "embedding.norm.bias"),
    ]
    corners = torch.linspace(0, 1, 48).view(1, 4, 3, 4)
    found = network({"boxes": corners, "categories": torch.tensor([1, 2, 0]).expand(1, 4, 3)})["action"]
    torch.testing.assert_close(found, torch.tensor([[0.25759324, -0.64335787]]), atol=1e-5, rtol=0)


def hand_facts(inputs):
    hands = inputs["categories"] == 1
    return {
        "sides": torch.where(hands, torch.randint(1, 3, hands.shape), 0),
        "states": torch.where(hands, torch.randint(1, 6, hands.shape), 0),
    }


@pytest.mark.parametrize("fact", ["sides", "states"])
def test_a_hand_s_side_and_state_are_seen_where_the_layout_asks_for_them(network, fact):
    inputs = layout()
    facts = hand_facts(inputs)
    assert_same(network(inputs | facts), network(inputs))
    asked = STLT({"verb": 5}, **TINY, **{fact: True}).eval()
    known = asked(inputs | facts)
    assert (known["verb"] - asked(inputs)["verb"]).abs().max() > 1e-3
    assert_same(asked(inputs), asked(inputs | {fact: facts[fact] * 0}))  # absent is unknown
    empty = inputs["categories"] == 0
    assert_same(known, asked(inputs | {fact: facts[fact].masked_fill(empty, 2)}))  # an empty slot has neither


def test_embedding_of_side_and_state_is_the_sum_of_the_tables():
    embedding = STLT({"verb": 5}, **TINY, norm_eps=0.1, sides=True, states=True).eval().embedding
    assert (embedding.side.weight.shape, embedding.state.weight.shape) == ((3, 32), (6, 32))
    assert not embedding.side.weight[0].any()
    assert not embedding.state.weight[0].any()
    inputs = layout(empty=())
    facts = hand_facts(inputs)
    total = (
        embedding.category.weight[inputs["categories"]]
        + inputs["boxes"] @ embedding.box.weight.T
        + embedding.box.bias
        + inputs["scores"][..., None] @ embedding.score.weight.T
        + embedding.score.bias
        + embedding.side.weight[facts["sides"]]
        + embedding.state.weight[facts["states"]]
    )
    centred = total - total.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt()
    torch.testing.assert_close(embedding(inputs | facts), expected)


def test_norm_eps_is_that_of_the_two_embeddings_alone():
    network = STLT({"verb": 5}, **TINY, norm_eps=0.1)
    other = {name for name, module in network.named_modules() if getattr(module, "eps", None) == 0.1}
    assert other == {"embedding.norm", "norm"}
