"""Every registered matcher, and every choice of metric, distance, partition, combination and place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tokenmerge
from tests.helpers.tiny import images_for, tiny
from tokenmerge import ConfigError, InputError, MergePlan, PatchError
from tokenmerge.matching import get_entry, get_matcher, matcher_names, register_matcher
from tokenmerge.matching.checks import check_plan
from tokenmerge.matching.distances import similarities
from tokenmerge.matching.partitions import partition_order
from tokenmerge.methods import get_method, method_names


def matcher_named(name: str) -> Any:
    """As whoever calls it directly gets it: it checks what it is given."""
    return get_matcher(name)


BUILT_IN = [
    name
    for name in matcher_names()
    if matcher_named(name).__module__.startswith("tokenmerge.") and not get_entry(name).learned  # test_predictors.py
]
STATIC = [name for name in BUILT_IN if name != "agglomerative" and not get_entry(name).adaptive]


def offered_for(batch: int, grid: tuple[int, int], protected: int, seed: int) -> dict[str, Any]:
    """What a block would fill in."""
    tokens = grid[0] * grid[1] + protected
    draw = torch.Generator().manual_seed(seed + 1000)
    return {
        "size": torch.randint(1, 9, (batch, tokens), generator=draw).float(),
        "attention": torch.rand(batch, tokens, generator=draw).softmax(dim=1),
        "tokens": torch.randn(batch, tokens, 5, generator=draw),
        "values": torch.randn(batch, 2, tokens, 4, generator=draw),
        "anchor": torch.arange(tokens).expand(batch, -1),
        "grid": grid,
        "layer": seed % 12,
        "layers": 12,
    }


def plan_of(name: str, batch: int, grid: tuple[int, int], protected: int, r: int, seed: int, **more: Any) -> MergePlan:
    tokens = grid[0] * grid[1] + protected
    draw = torch.Generator().manual_seed(seed)
    entry = get_entry(name)
    offered = {**offered_for(batch, grid, protected, seed), **more}
    metric = torch.randn(batch, tokens, 6, generator=draw)
    if seed % 3 == 0:  # equal tokens, as padding and flat images make them
        metric[:, protected + 1 :: 2] = metric[:, protected : protected + 1]
    plan: MergePlan = matcher_named(name)(
        metric, r, protected, **{k: v for k, v in offered.items() if k in entry.offered}
    )
    return plan


@pytest.mark.parametrize("name", BUILT_IN)
@given(
    st.integers(1, 3),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.integers(0, 3),
    st.integers(0, 30),
    st.integers(0, 99),
)
def test_every_plan_is_a_map(name: str, batch: int, grid: tuple[int, int], protected: int, r: int, seed: int) -> None:
    plan = plan_of(name, batch, grid, protected, r, seed)
    free = grid[0] * grid[1]
    assert plan.r == min(r, plan.r)
    if r <= free // 2:
        assert plan.r == r
    assert torch.equal(
        torch.cat([plan.kept, plan.source], dim=1).sort(dim=1).values, torch.arange(free + protected).expand(batch, -1)
    )
    assert torch.equal(plan.kept[:, :protected], torch.arange(protected).expand(batch, -1)), (
        "protected tokens stay in place"
    )
    joined = plan.target[plan.target >= 0]
    assert not len(joined) or (int(joined.min()) >= protected and int(joined.max()) < plan.tokens_out)
    assert plan.drops or bool((plan.target >= 0).all())
    # sizes: what is merged adds up, what is dropped is gone
    size = torch.ones(batch, free + protected)
    _, after = plan.merge(torch.randn(batch, free + protected, 3), size)
    assert torch.equal(after.sum(dim=1), size.sum(dim=1) - (plan.target < 0).sum(dim=1))


@pytest.mark.parametrize("name", BUILT_IN)
def test_images_do_not_know_of_each_other(name: str) -> None:
    model = tiny("deit_tiny_patch16_224")
    images = images_for(model, 3)
    with tokenmerge.patched(model, r=4, matcher=name), torch.no_grad():
        together, alone = model(images), torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_one_broken_image_breaks_no_other(name: str, broken: float) -> None:
    """Whatever an image holds, its plan is a map, and the other images' plans are what they were."""
    entry, grid, protected, r = get_entry(name), (4, 4), 2, 5
    offered = offered_for(3, grid, protected, 1)
    metric = torch.randn(3, 18, 6)
    for every in (False, True):  # one token of the image, and all of them
        bad = {**offered, "metric": metric}
        for field in ("metric", "attention", "tokens", "values"):
            axis = 1 if field == "values" else 0
            bad[field] = bad[field].clone()
            bad[field][1].narrow(axis, 5, 1 if not every else 13).fill_(broken)
        plans = [
            matcher_named(name)(m, r, protected, **{k: v for k, v in more.items() if k in entry.offered})
            for m, more in ((metric, offered), (bad["metric"], bad))
        ]
        check_plan(plans[1], name, metric, protected)
        if not entry.adaptive:  # which shares r among the images of a batch
            assert torch.equal(plans[0].assign[::2], plans[1].assign[::2])


def _wrong_plans() -> dict[str, Callable[[MergePlan], Any]]:
    """What a matcher might give for 4 of 37 tokens of which the first is protected, made of a right plan."""

    def with_(plan: MergePlan, field: str, column: int, value: Any) -> MergePlan:
        changed = getattr(plan, field).clone()
        changed[:, column] = value
        return dataclasses.replace(plan, **{field: changed})

    def exchanged(plan: MergePlan) -> MergePlan:
        plan, class_token = with_(plan, "source", 0, 0), plan.source[:, 0]
        return with_(plan, "kept", 0, class_token)

    return {
        "merges the class token": exchanged,
        "moves the class token": lambda plan: dataclasses.replace(plan, kept=plan.kept.roll(1, 1)),
        "merges into the class token": lambda plan: with_(plan, "target", 2, 0),
        "names a token twice": lambda plan: with_(plan, "source", 0, plan.source[:, 1]),
        "names a token that is not there": lambda plan: with_(plan, "kept", 9, 37),
        "joins a position that is not there": lambda plan: with_(plan, "target", 1, 33),
        "drops and does not say so": lambda plan: with_(plan, "target", 1, -1),
        "drops to −2": lambda plan: dataclasses.replace(with_(plan, "target", 1, -2), drops=True),
        "int32": lambda plan: dataclasses.replace(plan, kept=plan.kept.int()),
        "one image": lambda plan: MergePlan(plan.kept[:1], plan.source[:1], plan.target[:1]),
        "a token less": lambda plan: dataclasses.replace(plan, kept=plan.kept[:, :-1]),
        "targets less": lambda plan: dataclasses.replace(plan, target=plan.target[:, :-1]),
        "assign": lambda plan: plan.assign,
    }


@pytest.mark.parametrize("fault", _wrong_plans())
def test_wrong_plans_of_matchers_from_elsewhere_are_refused(fault: str) -> None:
    """Merging trusts a plan, so a wrong one would give wrong numbers, or read memory that is not its own."""
    change = _wrong_plans()[fault]

    @register_matcher("wrong")
    def wrong(metric: Tensor, r: int, protected: int = 0) -> MergePlan:
        return cast("MergePlan", change(tokenmerge.bipartite_matching(metric, r, protected)))

    model = tiny("deit_tiny_patch16_224", depth=2)
    refused = pytest.raises(PatchError, match="matcher 'wrong' gave")
    with tokenmerge.patched(model, r=4, matcher="wrong"), torch.no_grad(), refused:
        model(images_for(model))
    with pytest.raises(PatchError, match="matcher 'wrong' gave"):
        get_matcher("wrong")(torch.randn(2, 37, 4), 4, 1)


@pytest.mark.slow
def test_wrong_plans_are_refused_in_compiled_models_and_right_ones_break_no_graph() -> None:
    for fault in ("none", "merges into the class token"):
        change: Any = _wrong_plans().get(fault, lambda plan: plan)

        @register_matcher("wrong")
        def wrong(metric: Tensor, r: int, protected: int = 0, change: Any = change) -> MergePlan:
            return cast("MergePlan", change(tokenmerge.bipartite_matching(metric, r, protected)))

        model = tiny("deit_tiny_patch16_224", depth=2)
        with tokenmerge.patched(model, r=4, matcher="wrong"), torch.no_grad():
            torch.compiler.reset()
            compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
            if fault == "none":
                torch.testing.assert_close(compiled(images_for(model)), model(images_for(model)))
            else:
                with pytest.raises(RuntimeError, match="matcher 'wrong' gave"):
                    compiled(images_for(model))


@pytest.mark.parametrize("name", [name for name in STATIC if name in ("bipartite", "kmeans")])
def test_called_in_a_forward_of_ones_own_it_compiles(name: str) -> None:
    """What the docs recommend for models that cannot be patched: a matcher called directly, checks and all."""
    entry, metric = get_entry(name), torch.randn(2, 18, 6)
    offered = {k: v for k, v in offered_for(2, (4, 4), 2, 1).items() if k in entry.offered}

    def own(x: Tensor) -> Tensor:
        plan = matcher_named(name)(x, 4, 2, **offered)
        return cast("Tensor", plan.unmerge(plan.merge(x)[0]))

    torch.compiler.reset()
    compiled: Any = torch.compile(own, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(metric), own(metric))


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_goes_with_a_metric_must_fit_it(name: str) -> None:
    entry, metric = get_entry(name), torch.randn(2, 18, 6)
    offered = {k: v for k, v in offered_for(2, (4, 4), 2, 1).items() if k in entry.offered}
    assert matcher_named(name)(metric, 4, 2, **offered).r == 4
    for field, value in offered.items():
        if isinstance(value, Tensor):
            token = 2 if field == "values" else 1
            for wrong in (value[:1], value.narrow(token, 0, 17), value.unsqueeze(0), value.tolist(), value.to("meta")):
                with pytest.raises(InputError, match=field):
                    matcher_named(name)(metric, 4, 2, **{**offered, field: wrong})
    if "anchor" in offered:
        with pytest.raises(InputError, match="int64"):
            matcher_named(name)(metric, 4, 2, **{**offered, "anchor": offered["anchor"].float()})
    if "grid" in offered:
        with pytest.raises(InputError, match="grid"):
            matcher_named(name)(metric, 4, 2, **{**offered, "grid": (4, 0)})


@pytest.mark.parametrize("name", BUILT_IN)
def test_half_precision(name: str) -> None:
    model = tiny("deit_tiny_distilled_patch16_224").to(torch.bfloat16)
    with tokenmerge.patched(model, r=3, matcher=name), torch.no_grad():
        assert torch.isfinite(model(images_for(model).to(torch.bfloat16))).all()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("bipartite", "kmeans") else pytest.mark.slow) for name in STATIC]
)
def test_compiled_without_breaks(name: str) -> None:
    """The last block, which takes sizes and merges: tracing costs half a second a block, and both are of one class."""
    model = tiny("deit_tiny_patch16_224", depth=2)
    images = images_for(model)
    with tokenmerge.patched(model, r=4, matcher=name), torch.no_grad():
        wanted = model(images)
        torch.compiler.reset()
        model.blocks[-1].compile(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(model(images), wanted)


FIELDS: list[dict[str, Any]] = [
    *({"metric": one} for one in ("q", "v", "kv", "x", "x_pre")),
    *({"metric": one, "heads": "concat"} for one in ("k", "v")),
    *({"distance": one} for one in ("dot", "euclidean", "softmax")),
    *({"partition": one} for one in ("sequential", "random", "checkerboard")),
    *({"combine": one} for one in ("average", "max", "destination", "norm", "max_norm", "tofu")),
    {"place": "before", "metric": "x_pre"},
    {"place": "after"},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_every_field_does_something(fields: dict[str, Any]) -> None:
    model = tiny("deit_tiny_patch16_224", depth=2, global_pool="avg")  # so that the last merge is seen as well
    images = images_for(model)
    with torch.no_grad():
        with tokenmerge.patched(model, r=9):  # so many that tokens merge that were merged before
            default = model(images)
        with tokenmerge.patched(model, r=9, **fields) as handle:
            ours = model(images)
            assert ours.shape == default.shape
            assert (ours - default).abs().max() > 1e-4, "the field changed nothing"
            again = tokenmerge.MergeConfig.from_json(handle.config.to_json())
            assert again == handle.config
            handle.update(r=0)
            merged_none = model(images)
        assert torch.equal(merged_none, model(images))


@pytest.mark.slow
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_every_field_compiles(fields: dict[str, Any]) -> None:
    """The last block, as above."""
    model = tiny("deit_tiny_patch16_224", depth=2, global_pool="avg")
    images = images_for(model)
    with tokenmerge.patched(model, r=9, **fields), torch.no_grad():
        wanted = model(images)
        torch.compiler.reset()
        model.blocks[-1].compile(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(model(images), wanted)


def _inside(model: Any, images: Tensor) -> dict[str, Tensor]:
    """Q, K, V of block 0 before any merge, written out from timm's own modules."""
    block = model.blocks[0]
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    qkv = block.attn.qkv(block.norm1(x)).unflatten(2, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (qkv[0] @ qkv[1].transpose(2, 3) * block.attn.scale).softmax(dim=3)
    after = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
    return {"x_pre": x, "x": after, "q": qkv[0], "k": qkv[1], "v": qkv[2], "attention": weights[:, :, 0].mean(dim=1)}


@pytest.mark.parametrize("metric", ["q", "k", "v", "x", "x_pre"])
@pytest.mark.parametrize("heads", ["mean", "concat"])
def test_matchers_see_what_the_config_says(metric: str, heads: str, spy: Callable[[], dict[str, Any]]) -> None:
    model = tiny("deit_tiny_patch16_224")
    images = images_for(model)
    with torch.no_grad():
        inside = _inside(model, images)
        with tokenmerge.patched(model, r=[3], matcher="spy", metric=metric, heads=heads):
            model(images)
    wanted = inside[metric]
    if wanted.dim() == 4:
        wanted = wanted.mean(dim=1) if heads == "mean" else wanted.transpose(1, 2).flatten(2)
    seen = spy()
    torch.testing.assert_close(seen["metric"], wanted)
    torch.testing.assert_close(seen["attention"], inside["attention"])
    torch.testing.assert_close(seen["tokens"], inside["x"])
    torch.testing.assert_close(seen["values"], inside["v"])
    assert torch.equal(seen["size"], torch.ones(2, 37))
    assert (seen["grid"], seen["layer"], seen["layers"], seen["flavour"]) == ((6, 6), 0, 3, "plain")


@pytest.fixture
def spy() -> Callable[[], dict[str, Any]]:
    seen: dict[str, Any] = {}

    @register_matcher("spy")
    def look(
        metric: Tensor,
        r: int,
        protected: int = 0,
        attention: Any = None,
        tokens: Any = None,
        values: Any = None,
        size: Any = None,
        grid: Any = None,
        layer: int = -1,
        layers: int = -1,
        flavour: str = "plain",
    ) -> MergePlan:
        seen.update({name: value for name, value in locals().items() if name != "seen"})
        return tokenmerge.bipartite_matching(metric, r, protected)

    return lambda: seen


def test_class_attention_counts_sizes() -> None:
    """A token of size 3 draws what three equal tokens would; without a class token the mean over queries counts."""
    from tokenmerge.attention.tap import class_attention

    query, key = torch.randn(1, 2, 5, 4, dtype=torch.float64), torch.randn(1, 2, 5, 4, dtype=torch.float64)
    size = torch.tensor([[1.0, 1, 3, 1, 1]])
    copies = torch.tensor([0, 1, 2, 2, 2, 3, 4])
    crowd = class_attention(query[:, :, copies], key[:, :, copies], 0.5, None, True)
    ours = class_attention(query, key, 0.5, size, True)
    torch.testing.assert_close(ours[0, 2], crowd[0, 2:5].sum())
    torch.testing.assert_close(ours.sum(dim=1), torch.ones(1))
    every = class_attention(query, key, 0.5, None, False)
    scores = (query.float() @ key.float().transpose(2, 3) * 0.5).softmax(dim=3).mean(dim=(1, 2))
    torch.testing.assert_close(every, scores)


@pytest.mark.parametrize("distance", ["cosine", "dot", "euclidean", "softmax"])
def test_distances_by_their_definitions(distance: str) -> None:
    a, b = torch.randn(2, 5, 4), torch.randn(2, 6, 4)
    wanted = {
        "cosine": torch.nn.functional.cosine_similarity(a[:, :, None], b[:, None], dim=3),
        "dot": (a[:, :, None] * b[:, None]).sum(dim=3),
        "euclidean": -0.5 * torch.cdist(a, b).square(),
        "softmax": (a @ b.transpose(1, 2) / 2).log_softmax(dim=2),
    }[distance]
    torch.testing.assert_close(similarities(a, b, cast("Any", distance)), wanted, atol=1e-5, rtol=1e-4)


def test_partitions_are_what_they_say() -> None:
    cpu = torch.device("cpu")
    sides = {}
    for name in ("sequential", "random", "checkerboard"):
        order = partition_order(name, 37, 1, (6, 6), 0, cpu)
        assert order is not None
        assert torch.equal(order.sort().values, torch.arange(37))
        sides[name] = order[2::2] - 1  # side A, as numbers of patches
    assert sides["sequential"].tolist() == list(range(18))
    assert all((i // 6 + i % 6) % 2 == 0 for i in sides["checkerboard"].tolist())
    other = partition_order("random", 37, 1, None, 1, cpu)
    assert other is not None
    assert set((other[2::2] - 1).tolist()) != set(sides["random"].tolist()), "another in each block"
    assert partition_order("checkerboard", 33, 1, (6, 6), 1, cpu) is None, "the grid is gone"


def test_greedy_merges_the_best_pairs_of_all() -> None:
    metric = torch.tensor([[[1.0, 0], [0, 1], [1, 0.1], [0.7, 0.7], [0.1, 1], [-1, 0]]])
    plan = matcher_named("greedy")(metric, 2)
    assert plan.assign[0].tolist() == [0, 1, 0, 2, 1, 3]


def test_mutual_pairs_come_first() -> None:
    # 0 and 1 are each other's nearest, and so are 2 and 3; 4 likes 3, which likes 2 better
    angles = torch.tensor([0.0, 0.2, 1.5, 1.6, 1.75])
    metric = torch.stack([angles.cos(), angles.sin()], dim=1)[None]
    assert matcher_named("mutual")(metric, 2).assign[0].tolist() == [0, 0, 1, 1, 2]


def test_clusters_of_k_means_and_k_medoids() -> None:
    """Three tight bundles in another order are found again."""
    bundle = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
    metric = torch.eye(3)[bundle] + 0.01 * torch.randn(9, 3)
    for name, extra in (("kmeans", {}), ("kmedoids", {"attention": torch.full((1, 9), 1 / 9)}), ("agglomerative", {})):
        assign = matcher_named(name)(metric[None], 6, **extra).assign[0]
        assert torch.equal(assign[:, None] == assign[None], bundle[:, None] == bundle[None]), name


def test_pruning_drops_what_the_class_token_does_not_see() -> None:
    attention = torch.tensor([[0.5, 0.1, 0.02, 0.2, 0.01, 0.17]])
    metric = torch.randn(1, 6, 4)
    assert matcher_named("attention_prune")(metric, 2, 1, attention=attention).assign[0].tolist() == [
        0,
        1,
        -1,
        2,
        -1,
        3,
    ]
    fused = matcher_named("evit")(metric, 2, 1, attention=attention)
    assert fused.assign[0].tolist() == [0, 3, 3, 1, 3, 2]
    x = torch.randn(1, 6, 3)
    weight = attention[0, [1, 2, 4]]
    torch.testing.assert_close(fused.merge(x)[0][0, 3], (weight[:, None] * x[0, [1, 2, 4]]).sum(0) / weight.sum())
    both = matcher_named("diffrate")(metric, 2, 1, attention=attention, pruned=0.5)
    assert (both.assign[0] == -1).tolist() == [False, False, False, False, True, False], "the least seen one goes"
    assert (
        matcher_named("diffrate")(metric, 2, 1, attention=attention, layer=1, pruned=[0.0, 1.0]).assign[0].min() == -1
    )


def test_pitome_protects_what_stands_alone() -> None:
    metric = torch.cat([torch.tensor([[1.0, 0, 0]]).repeat(6, 1), torch.tensor([[0, 1.0, 0], [0, 0, 1.0]])])[None]
    assign = matcher_named("pitome")(metric, 3, layer=0, layers=12).assign[0]
    assert (assign == assign[6]).sum() == 1
    assert (assign == assign[7]).sum() == 1


def test_destinations_of_strided_matching_never_go() -> None:
    model = tiny("deit_tiny_patch16_224", depth=6)
    images = images_for(model)
    with tokenmerge.patched(model, r=[8, 8, 8, 4, 2, 1], matcher="strided", trace=True) as handle, torch.no_grad():
        model(images)
        fixed = torch.tensor([1 + row * 6 + column for row in (0, 2, 4) for column in (0, 2, 4)])
        source = handle.trace.source(2)  # 12 patches are left: 9 destinations and 3 others
        assert all(len(set(one[fixed].tolist())) == 9 for one in source)


def test_thresholds_merge_more_where_tokens_are_alike() -> None:
    alike = torch.ones(1, 20, 4) + 0.01 * torch.randn(1, 20, 4)
    different = torch.randn(1, 20, 4)
    matcher = matcher_named("threshold")
    assert matcher(alike, 3, thresholds=[0.9]).r == 10
    assert matcher(different, 3, thresholds=[0.999]).r < 3
    assert matcher(torch.cat([alike, different]), 3, thresholds=[0.9999]).kept.shape[0] == 2
    assert matcher(different, 3).r == 3


def test_dropped_tokens_stay_dropped() -> None:
    model = tiny("vit_base_patch16_224", global_pool="avg", fc_norm=False)
    images = images_for(model)
    with tokenmerge.patched(model, r=5, matcher="attention_prune", trace=True) as handle, torch.no_grad():
        features = model.forward_features(images)
        source = handle.trace.source()
        assert int((source < 0).sum()) == 2 * 15
        full = handle.trace.unmerge(features)
        assert not full[source < 0].any()
        assert torch.equal(full[0, 0], features[0, 0])
        assert tokenmerge.token_sizes(features).sum(dim=1).tolist() == [22, 22]
        assert model.forward_intermediates(images, intermediates_only=True)[-1].shape == (2, 48, 6, 6)


def test_relative_positions_survive_dropping() -> None:
    model = tiny("beit_base_patch16_224")
    with tokenmerge.patched(model, r=4, matcher="random_prune"), torch.no_grad():
        assert torch.isfinite(model(images_for(model))).all()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"matcher": "nope"}, "is not registered; known are"),
        ({"options": {"iterations": 3}}, "has no option 'iterations'"),
        ({"matcher": "kmeans", "distance": "dot"}, "means nothing to matcher 'kmeans'"),
        ({"place": "before"}, "give metric='x_pre' as well"),
        ({"place": "before", "metric": "x_pre", "matcher": "evit"}, "looks at it: use place='between'"),
        ({"combine": "sum"}, "combine='sum', but it must be one of"),
        ({"metric": ["k"]}, "must be one of k, q"),
        ({"options": 3}, "must map names to values"),
        ({"speedup": 0.5}, "how many times fewer FLOPs"),
    ],
)
def test_what_means_nothing_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tokenmerge.patch(tiny("deit_tiny_patch16_224"), **(fields if "speedup" in fields else {"r": 2, **fields}))


def test_attention_that_cannot_be_looked_into_is_refused() -> None:
    model = tiny("beit_base_patch16_224")
    with pytest.raises(ConfigError, match="scaled_dot_product_attention"):
        tokenmerge.patch(model, r=2, metric="v")
    assert not tokenmerge.is_patched(model)
    unfused = tiny("deit_tiny_patch16_224")
    for block in unfused.blocks:
        block.attn.fused_attn = False
    with pytest.raises(ConfigError, match="fused"):
        tokenmerge.patch(unfused, r=2, matcher="evit")


def test_padding_is_not_mixed_in() -> None:
    model = tiny("naflexvit_base_patch16_gap")
    with tokenmerge.patched(model, r=2, combine="max"), torch.no_grad():
        patches = torch.randn(1, 12, 16 * 16 * 3)
        coord = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij"), dim=-1).reshape(1, 12, 2)
        valid = torch.ones(1, 12, dtype=torch.bool)
        valid[:, 9:] = False
        with pytest.raises(PatchError, match="would mix padding"):
            model(patches, patch_coord=coord, patch_valid=valid)


def test_methods_name_configs() -> None:
    for name in method_names():
        method = get_method(name)
        tokenmerge.MergeConfig.create(r=2, **method.fields)
        assert method.kind in ("matching", "clustering", "pruning")
    with pytest.raises(ConfigError, match="known are tome"):
        get_method("nope")
    assert tokenmerge.MergeConfig.create(matcher="kmeans", options={"iterations": 2}).options == {"iterations": 2}
    changed = tokenmerge.MergeConfig.create(
        tokenmerge.MergeConfig(matcher="kmeans", options={"iterations": 2}), matcher="greedy"
    )
    assert changed.options == {}, "another matcher has other options"


def test_speedup_is_flops_turned_over() -> None:
    model = tiny("deit_tiny_patch16_224", depth=6)
    with tokenmerge.patched(model, speedup=1.5) as handle:
        assert handle.summary().flops_ratio >= 1.5
        by_speedup = handle.schedule
        handle.update(flops=1 / 1.5)
        assert handle.schedule == by_speedup


@pytest.mark.parametrize("size_penalty", ["none", "harmonic", "sqrt_harmonic", "source", "sqrt_source"])
@pytest.mark.parametrize("token_weight", [0.0, 0.5])
def test_the_informed_cost_by_its_definition(size_penalty: str, token_weight: float) -> None:
    batch, tokens, protected, r = 2, 15, 1, 4
    metric, x = torch.randn(batch, tokens, 6), torch.randn(batch, tokens, 9)
    size = torch.randint(1, 6, (batch, tokens)).float()
    attention = torch.rand(batch, tokens).softmax(dim=1)
    options: dict[str, Any] = {"size_penalty": size_penalty, "token_weight": token_weight, "attention_power": 0.5}
    plan = matcher_named("informed")(metric, r, protected, size=size, attention=attention, tokens=x, **options)
    a, b = list(range(2, tokens, 2)), list(range(1, tokens, 2))
    for image in range(batch):
        k, v = metric[image], x[image]
        unit = v.square().sum(dim=1).mean()
        edges = []
        for i in a:
            costs = []
            for j in b:
                cosine = torch.nn.functional.cosine_similarity(k[i], k[j], dim=0)
                cost = (1 - token_weight) * (1 - cosine) + token_weight * (v[i] - v[j]).square().sum() / (2 * unit)
                n, m = size[image, i], size[image, j]
                harmonic = 2 * n * m / (n + m)
                penalty = {"harmonic": float(harmonic), "source": float(n)}.get(size_penalty.removeprefix("sqrt_"), 1.0)
                cost = cost * (penalty**0.5 if size_penalty.startswith("sqrt_") else penalty)
                costs.append(float(cost * (attention[image, i] * (tokens - protected)) ** 0.5))
            edges.append((min(costs), i, b[costs.index(min(costs))]))
        merged = {i: j for _, i, j in sorted(edges)[:r]}
        assign = plan.assign[image].tolist()
        assert {i: j for i in merged for j in b if assign[i] == assign[j]} == merged
