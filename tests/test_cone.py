"""Cones: generators, projection, inverse map, layers. Numbered checks are properties that define the method."""

import copy
import math
import re
import sys
import time
from fractions import Fraction

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import nn

from conftest import sum_bound
from lowbit_ext import cone
from lowbit_ext.cone import Cone, ConeActivation, ConeLinear, Polyhedron, generators, layers
from lowbit_ext.cone.projection import Projection
from process_groups import needs_gloo, run_in_two_processes
from reference import cone as reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PHI = list(layers.NONNEGATIVE)


def cube_cone(dimension):
    """|x_i| <= x_0: 2^(d-1) rays."""
    rows = np.repeat(np.eye(dimension, dtype=int)[1:], 2, axis=0)
    rows[1::2] *= -1
    rows[:, 0] = -1
    return rows


def random_cone(rows, dimension, seed=0):
    """Inequalities with a common interior point."""
    rng = np.random.default_rng(seed)
    matrix = rng.integers(-9, 10, (rows, dimension))
    matrix[matrix @ rng.integers(-9, 10, dimension) > 0] *= -1
    return matrix


POLYTOPE = (np.array([[1, 1], [-1, 2], [-1, -3], [2, -1]]), [4, 3, 6, 5])

# Entries between 0 and 2 / 5 that sum to 1.
CAPPED_SIMPLEX = (np.concatenate([-np.eye(5, dtype=int), np.eye(5, dtype=int)]), [0] * 5 + [Fraction(2, 5)] * 5,
                  ([[1] * 5], [1]))

CONES = {
    "checkerboard": lambda: cone.checkerboard(8, 8, 4),
    "monotone": lambda: cone.monotone(9),
    "convex": lambda: cone.convex(9),
    "monotone_convex": lambda: cone.monotone_convex(9),
    "nonnegative": lambda: cone.nonnegative(5),
    "simplex": lambda: cone.simplex(5),
    "box": lambda: cone.box(4, [-1, 0, -2.5, 1], [1, 0.5, math.inf, 1.25]),
    "cube": lambda: Cone(cube_cone(5)),
    "random": lambda: Cone(random_cone(12, 5)),
    "polytope": lambda: Cone(*POLYTOPE),
    "unbounded": lambda: Cone([[-1, 0, 1], [0, -1, 0], [-1, -1, 0]], [0, 0, -1]),
    "apex elsewhere": lambda: Cone(cube_cone(4), cube_cone(4) @ np.array([1, 2, 3, 4])),
    "independent, b": lambda: Cone([[1, 2, 0, 1], [0, 1, -1, 0]], [Fraction(1, 3), -2]),
    "equalities": lambda: Cone(-np.eye(5), equality=([[1, 2, 3, 0, 0], [0, 0, 0, 1, -1]], [6, 0])),
    "cone with equality": lambda: Cone(cube_cone(5), equality=[[1, 1, 1, -4, 0]]),
    "float64": lambda: Cone(np.random.default_rng(1).standard_normal((4, 6)), exact=False),
    "several groups": lambda: Cone(np.kron(np.eye(3, dtype=int), cube_cone(3)), [0] * 8 + [1] * 4),
    "capped simplex": lambda: Cone(*CAPPED_SIMPLEX),
    "bounds beside a row and its opposite": lambda: Cone(
        [[1, -2, 3, 0], [-1, 2, -3, 0], [1, 0, 0, 0], [0, -1, 0, 0], [0, 1, 0, 0], [0, 0, -1, 0]], [3, 1, 1, 2, 2, 1]),
    "without interior": lambda: Cone([[1, 1, 0], [-1, 0, 0], [0, -1, 0], [1, 0, 1], [0, 2, 1], [1, 1, 1]]),
}


@pytest.fixture(params=CONES)
def example(request):
    return CONES[request.param]()


def points_of(c, count, seed=0):
    """Random points of the set, float64, from random coefficients."""
    generator = torch.Generator().manual_seed(seed)
    rays, lines, _ = c.coefficient_counts
    beta = torch.randn(count, rays, dtype=torch.float64, generator=generator).relu()
    gamma = torch.randn(count, lines, dtype=torch.float64, generator=generator)
    alpha = [torch.randn(count, n, dtype=torch.float64, generator=generator).softmax(1) for n in c.vertex_groups]
    return c.combine(torch.cat([beta, gamma, *alpha], 1))


def same_cone(matrix, rays, lines):
    """Whether rays and lines generate {x : matrix x <= 0}, by an independent double description."""
    expected_rays, expected_lines = reference.double_description(matrix)
    assert len(rays) == len(expected_rays), f"{len(rays)} rays, expected {len(expected_rays)}"
    assert len(lines) == len(expected_lines), f"{len(lines)} lines, expected {len(expected_lines)}"
    sets = [np.array(part, dtype=np.float64).reshape(-1, len(matrix[0])) for part in
            (rays, lines, expected_rays, expected_lines)]
    generate(*sets)
    generate(*sets[2:], *sets[:2])


def generate(rays, lines, other_rays, other_lines):
    """Asserts that the first generators express the others."""
    columns = np.concatenate([rays, lines, -lines]).T
    for target in [*other_rays, *other_lines, *-other_lines]:
        residual = nnls(columns, target, maxiter=10000)[1] if columns.size else np.linalg.norm(target)
        assert residual <= 1e-9 * max(1.0, np.linalg.norm(target))


# --- counts, and the same cone by every path --------------------------------------------------------------------------


def test_checkerboard_by_structure_by_pseudo_inverse_and_by_double_description():
    """Independent rows by structure, by a pseudo-inverse and by double description give one cone."""
    c = cone.checkerboard(8, 8, 4)
    matrix = c._a
    assert np.linalg.matrix_rank(matrix) == 4
    assert c.coefficient_counts == (4, 60, 0)
    assert np.linalg.matrix_rank(np.concatenate([c.rays, c.lines])) == 64
    same_cone(matrix.astype(int).tolist(), c.rays.tolist(), c.lines.tolist())
    pseudo = Cone(matrix, exact=False)
    assert not pseudo.exact
    generate(pseudo.rays.numpy(), pseudo.lines.numpy(), c.rays.numpy(), c.lines.numpy())
    generate(c.rays.numpy(), c.lines.numpy(), pseudo.rays.numpy(), pseudo.lines.numpy())


def test_checkerboard_of_the_paper():
    c = cone.checkerboard()
    assert c._a.shape == (16, 784)
    assert c.coefficient_counts == (16, 768, 0)
    assert all(part.is_ternary for part in c._all_generators)
    tiles = c._a.reshape(16, 28, 28)
    assert (tiles[0, :7, :7] == 1).all()  # dark
    assert (tiles[1, :7, 7:14] == -1).all()  # bright
    assert (tiles[4, 7:14, :7] == -1).all()
    assert abs(tiles).sum() == 784
    assert int((c.rays != 0).sum(1).max()) == 1
    assert int((c.lines != 0).sum(1).max()) == 2


@pytest.mark.parametrize(("build", "counts"), [
    (lambda: cone.monotone(7), (6, 1, 0)),
    (lambda: cone.monotone(200, decreasing=True), (199, 1, 0)),
    (lambda: cone.convex(7), (5, 2, 0)),
    (lambda: cone.convex(200, concave=True), (198, 2, 0)),
    (lambda: cone.monotone_convex(7), (6, 1, 0)),
    (lambda: Cone(cube_cone(3)), (4, 0, 0)),
    (lambda: Cone(cube_cone(8)), (128, 0, 0)),
    (lambda: cone.nonnegative(6), (6, 0, 0)),
    (lambda: cone.simplex(6), (0, 0, 6)),
    (lambda: cone.box(3, 0, 1), (0, 0, 6)),
    (lambda: Cone([[1, 0, 0]]), (1, 2, 0)),
])
def test_counts(build, counts):
    """The named cones have as many generators as their docstrings say."""
    assert build().coefficient_counts == counts


def test_vertices():
    """[0, 1]^3 has 8 vertices, as a product and as one group that shares coordinates."""
    corners = {(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)}
    assert {tuple(map(int, row)) for row in cone.box(3, 0, 1).vertices.tolist()} == corners
    shear = np.array([[1, 1, 0], [0, 1, 1], [0, 0, 1]])
    rows = np.concatenate([np.eye(3, dtype=int), -np.eye(3, dtype=int)])
    sheared = Cone(rows @ shear, [1, 1, 1, 0, 0, 0])
    assert sheared.vertex_groups == [8]
    assert {tuple(np.rint(shear @ row).astype(int)) for row in sheared.vertices.numpy()} == corners
    assert torch.equal(torch.sort(cone.simplex(4).vertices, 0).values, torch.sort(torch.eye(4).double(), 0).values)
    assert torch.equal(cone.nonnegative(3).vertices, torch.zeros(1, 3, dtype=torch.float64))


small = st.integers(-3, 3)


@st.composite
def full_rank(draw):
    rows, more = draw(st.integers(1, 4)), draw(st.integers(0, 2))
    matrix = draw(st.lists(st.lists(small, min_size=rows + more, max_size=rows + more), min_size=rows, max_size=rows))
    if np.linalg.matrix_rank(np.array(matrix)) < rows:
        matrix = [[value + 7 * (i == j) for j, value in enumerate(row)] for i, row in enumerate(matrix)]
    return matrix


@st.composite
def disjoint(draw):
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    matrix, start = np.zeros((len(sizes), sum(sizes)), dtype=int), 0
    for i, size in enumerate(sizes):
        matrix[i, start : start + size] = draw(st.lists(small.filter(bool), min_size=size, max_size=size))
        start += size
    return matrix.tolist()


@st.composite
def redundant(draw):
    matrix = np.array(draw(full_rank()))
    for _ in range(draw(st.integers(1, 3))):
        weights = draw(st.lists(st.integers(0, 3), min_size=len(matrix), max_size=len(matrix)))
        matrix = np.concatenate([matrix, [weights @ matrix]])
    return matrix.tolist()


@st.composite
def degenerate(draw):
    """Anything: dependent rows, zero rows, opposite rows, cones without interior."""
    dimension = draw(st.integers(1, 4))
    row = st.lists(st.integers(-1, 1), min_size=dimension, max_size=dimension)
    return draw(st.lists(row, min_size=1, max_size=6))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(full_rank(), disjoint(), redundant(), degenerate()))
def test_every_path_gives_the_cone_of_double_description(matrix):
    rays, lines = reference.double_description(matrix)
    if not np.any(matrix) or not (rays or lines):
        with pytest.raises(ValueError, match="Cone: "):
            Cone(matrix)
        return
    c = Cone(matrix)
    assert c.largest_violation == 0
    assert c.predicted_rays >= len(c.rays)
    same_cone(matrix, c.rays.tolist(), c.lines.tolist())


@st.composite
def constraints(draw):
    """Inequalities and equalities, with and without right sides, that leave anything from nothing to everything."""
    dimension, most = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 3, 9]))
    number = st.integers(-most, most)
    row = st.lists(number, min_size=dimension, max_size=dimension)
    a, e = draw(st.lists(row, min_size=1, max_size=7)), draw(st.lists(row, max_size=3))
    zero, positive = st.just(0), st.integers(0, 5)
    right = draw(st.sampled_from([zero, positive, st.integers(-3, 5)]))
    b = draw(st.lists(right, min_size=len(a), max_size=len(a)))
    f = draw(st.lists(zero if right is zero else st.integers(-2, 2), min_size=len(e), max_size=len(e)))
    return a, b, e, f


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(constraints())
@hypothesis.example(([[1, 1, 1]], [0], [[2, 1, 0]], [0]))  # slopes that are integers
@hypothesis.example((  # one point, by rows whose right sides are 0 but for rounding
    [[-2, -1, 0, -1], [-2, -2, 2, 2], [1, -1, 0, -2], [2, 0, 2, -1], [-1, 1, 1, -2], [-2, 1, -2, 1], [1, -1, -1, -2]],
    [0, 4, 0, 1, 4, 0, 0], [[0, 2, 0, -2], [2, -2, 1, 2]], [-1, 1],
))
def test_constraints_give_the_polyhedron_of_double_description(chosen):
    """Generators, refusals, membership, projection and inverse map, against exact double description."""
    a, b, e, f = chosen
    arguments = (a, b, (e, f) if e else None)
    rays, lines, vertices = reference.polyhedron(a, b, e, f)
    if not vertices or (not np.any(a) and not np.any(e)):
        for build in (Cone, Polyhedron):
            with pytest.raises(ValueError, match=r"no x satisfies|nothing to constrain"):
                build(*arguments)
        return
    x = 3 * torch.randn(8, len(a[0]), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    by_constraints = Polyhedron(*arguments)
    y = by_constraints.project(x)
    assert by_constraints.contains(y).all()
    assert_optimal(x, y, rays, lines, vertices)
    if len(vertices) == 1 and not rays and not lines:
        with pytest.raises(ValueError, match="the constraints leave only the point"):
            Cone(*arguments)
        return
    c = Cone(*arguments)
    assert c.largest_violation == 0
    assert c.predicted_rays >= len(rays)
    assert (len(c.rays), len(c.lines), len(c.vertices)) == (len(rays), len(lines), len(vertices))
    numbers = {value for s in c.summands for part in (s.rays, s.lines, s.vertices) for row in part
               for value in row.values()}
    assert all(type(value) is int or value.denominator > 1 for value in numbers)
    ours, exact = lifted(c.rays.tolist(), c.lines.tolist(), c.vertices.tolist()), lifted(rays, lines, vertices)
    generate(*ours, *exact)
    generate(*exact, *ours)
    assert torch.equal(c.project(x), y)
    torch.testing.assert_close(c.combine(c.coefficients(y)), y, rtol=0, atol=1e-9 * (1 + float(y.abs().max())))


def lifted(rays, lines, vertices):
    """Rays and lines of the cone over a polyhedron."""
    width = len([*rays, *lines, *vertices][0]) + 1
    upper, level = [[*ray, 0] for ray in rays] + [[*vertex, 1] for vertex in vertices], [[*line, 0] for line in lines]
    return [np.array(part, dtype=np.float64).reshape(-1, width) for part in (upper, level)]


def assert_optimal(x, y, rays, lines, vertices):
    """Asserts that y is the projection of x: nothing of the set lies further towards x."""
    normal, size = (x - y).numpy(), float(1 + x.abs().max() + y.abs().max())
    for part in (rays, lines, [[-value for value in line] for line in lines]):
        for way in np.array(part, dtype=np.float64):
            assert (normal @ way <= 1e-9 * size * np.linalg.norm(way)).all()
    for vertex in np.array(vertices, dtype=np.float64):
        assert (((vertex - y.numpy()) * normal).sum(1) <= 1e-9 * size * (size + np.linalg.norm(vertex))).all()


@settings(max_examples=60, deadline=None)
@given(st.one_of(full_rank(), disjoint(), redundant()))
def test_structure_needs_no_double_description(matrix):
    assert all(summand.method != "double description" for summand in Cone(matrix).summands)


def test_many_rows_of_simple_structure_need_no_double_description():
    c = cone.simplex(700)
    assert c.coefficient_counts == (0, 0, 700)
    assert torch.equal(c.vertices.sort(0).values, torch.eye(700).double().sort(0).values)
    assert c.predicted_rays == 700
    # Each sum of neighbours is implied by the entries.
    c = Cone(-np.concatenate([np.eye(300), np.eye(300) + np.eye(300, k=1)]).astype(int))
    assert c.coefficient_counts == (300, 0, 0)


def test_rows_that_imply_one_another_are_not_all_left_out():
    """Rows of a cube cone, doubled by multiples of x_4, which other rows make 0."""
    cube = np.pad(np.repeat(cube_cone(4), 2, axis=0), ((0, 0), (0, 2)))
    cube[::2, 4], cube[1::2, 4] = 1, 2
    zero = [[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, -1, 0], [0, 0, 0, 0, 0, -1]]
    c = Cone(np.concatenate([cube, zero]))
    assert len(c.rays) == 8
    assert c.predicted_rays >= 8


def test_predicted_rays_is_mcmullens_bound():
    assert cone.predicted_rays(36, 12) == 285012
    assert cone.predicted_rays(7, 3) == 7  # a polygon of seven sides
    # Reached by the cone over the dual of a cyclic polytope, whose inequalities lie on the moment curve.
    matrix = [[-(t**power) for power in range(5)] for t in range(1, 9)]
    assert len(Cone(matrix).rays) == cone.predicted_rays(8, 5)


def test_numbers_of_every_kind():
    expected = Cone([[1, -2, 0.5], [0, 3, 1]], [0.25, 7])
    rows = np.array([[1, -2, 0.5], [0, 3, 1]])
    for kind in (np.float16, np.float32, np.longdouble, object):
        c = Cone(rows.astype(kind), np.array([0.25, 7]).astype(kind))
        assert torch.equal(c.rays, expected.rays)
        assert torch.equal(c.vertices, expected.vertices)
    mixed = [[np.int64(1), np.float32(-2), Fraction(1, 2)], [0.0, np.uint8(3), True]]
    assert torch.equal(Cone(mixed, [Fraction(1, 4), np.int16(7)], max_rays=np.int64(9)).rays, expected.rays)
    # Fractions of denominator 1, and integers whose differences overflow int64.
    assert torch.equal(Cone([[Fraction(4, 2), Fraction(-2)]]).rays, Cone([[1, -1]]).rays)
    wide = np.array([[2**63 - 1, -(2**63)], [1, 1]])
    assert Cone(wide, exact=True).largest_violation == 0
    for build in (cone.monotone, cone.convex, cone.nonnegative, cone.simplex, cone.box):
        assert torch.equal(build(np.int32(4)).rays, build(4).rays)
    assert ConeLinear(np.int64(6), cone.monotone(3)).in_features == 6


def test_float_entries_are_taken_at_their_exact_value():
    matrix = np.random.default_rng(0).standard_normal((8, 4))
    matrix[matrix @ np.ones(4) > 0] *= -1
    c = Cone(matrix, exact=True)
    assert c.exact
    assert c.largest_violation == 0
    assert all(isinstance(value, int) for summand in c.summands for ray in summand.rays for value in ray.values())


def test_costly_elimination_falls_back_to_float64(monkeypatch):
    matrix = np.random.default_rng(0).standard_normal((6, 9))
    monkeypatch.setattr(generators, "EXACT_WORK_LIMIT", 1.0)
    c = Cone(matrix)
    assert not c.exact
    assert float(c.largest_violation) < 1e-13
    exact = Cone(matrix, exact=True)
    generate(c.rays.numpy(), c.lines.numpy(), exact.rays.numpy(), exact.lines.numpy())


def test_certificate_notices_wrong_generators():
    c = Cone(random_cone(12, 5))
    parts = generators.exact_constraints(c._a, c._b, c._e, c._f)
    assert generators.largest_violation(c.summands, *parts) == 0
    (summand,) = c.summands
    summand.rays[0] = {j: -value for j, value in summand.rays[0].items()}
    assert generators.largest_violation(c.summands, *parts) > 0


# --- outputs satisfy the constraints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("nonnegative", PHI)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_satisfy_the_constraints(example, dtype, nonnegative):
    """Within the documented bound; float64 within 1e-12."""
    torch.manual_seed(0)
    layer = ConeLinear(12, example, nonnegative).to(dtype)
    nn.init.normal_(layer.linear.bias)
    for scale in (0.1, 1.0, 10.0):
        coefficients = layer.linear(scale * torch.randn(200, 12, dtype=dtype))
        x = layer.activation(coefficients).detach()
        assert x.dtype == dtype
        row_norm = max(np.linalg.norm(np.concatenate([example._a, example._e]), axis=1))
        violation = example.violation(x)
        exact = float(example.largest_violation) * (1 + coefficients.double().abs().sum(1))
        # f = A x0 is rounded to the type as well.
        right = torch.finfo(dtype).eps * max(abs(example._b).max(), abs(example._f).max(initial=0))
        assert (violation <= row_norm * layer.activation.rounding_bound(coefficients) + exact + right).all()
        if dtype == torch.float64:
            assert (violation <= 1e-12 * row_norm * (x.norm(dim=1) + right + 1)).all()


@pytest.mark.parametrize("name", ["checkerboard", "monotone", "convex", "nonnegative", "cube"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_violation_is_a_rounding_of_the_output(name, dtype):
    """max(A x) <= eps ||A|| ||x||."""
    torch.manual_seed(1)
    c = CONES[name]()
    x = ConeLinear(16, c).to(dtype)(torch.randn(1000, 16, dtype=dtype)).detach()
    norm = np.linalg.norm(c._a, 2)
    assert (c.violation(x) <= torch.finfo(dtype).eps * norm * x.double().norm(dim=1)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_box_keeps_the_constraints(dtype):
    """Outputs stay in [-c, c] and in the cone."""
    torch.manual_seed(0)
    for c in (cone.checkerboard(8, 8, 4), cone.monotone(9), Cone(cube_cone(5))):
        layer = ConeLinear(12, c, box=0.75).to(dtype)
        x = layer(10 * torch.randn(300, 12, dtype=dtype)).detach()
        assert x.abs().max() <= 0.75 * (1 + torch.finfo(dtype).eps)
        assert x.abs().max() > 0.7
        assert (c.violation(x) <= 4 * torch.finfo(dtype).eps * np.linalg.norm(c._a, 2) * x.double().norm(dim=1)).all()


def test_autocast_keeps_the_constraints():
    torch.manual_seed(0)
    c = cone.convex(40)
    layer = ConeLinear(16, c)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = layer(torch.randn(100, 16))
    assert x.dtype == torch.bfloat16
    assert (c.violation(x) <= torch.finfo(x.dtype).eps * np.linalg.norm(c._a, 2) * x.double().norm(dim=1)).all()


# --- completeness and the inverse map ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["checkerboard", "monotone", "cube", "random", "convex"])
def test_generators_reach_every_feasible_point(name):
    """Points found without the generators (rejection, projection) are combinations of them."""
    c = CONES[name]()
    rng = np.random.default_rng(2)
    x = rng.standard_normal((1000, c.dimension))
    outside = (x @ c._a.T > 0).any(1)
    x[outside] = [v - c._a.T @ nnls(c._a.T, v)[0] for v in x[outside]]
    columns = np.concatenate([c.rays, c.lines, -c.lines]).T
    assert max(nnls(columns, v, maxiter=10000)[1] for v in x) < 1e-9


def test_coefficients_are_the_inverse_map(example):
    x = torch.cat([points_of(example, 300), example.project(3 * torch.randn(300, example.dimension).double())])
    coefficients = example.coefficients(x)
    rays, lines, _ = example.coefficient_counts
    assert (coefficients[:, :rays] >= 0).all()
    alpha = coefficients[:, rays + lines :]
    assert (alpha >= 0).all()
    for part in alpha.split(example.vertex_groups, 1):
        torch.testing.assert_close(part.sum(1), torch.ones(len(x), dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(example.combine(coefficients), x, atol=1e-9, rtol=1e-9)


def test_coefficients_shape_and_type():
    c = cone.monotone(4)
    x = torch.arange(4.0).expand(2, 3, 4)
    assert c.coefficients(x).shape == (2, 3, 4)
    assert c.coefficients(x).dtype == torch.float32
    assert torch.equal(c.combine(c.coefficients(x)), x)


# --- projection -------------------------------------------------------------------------------------------------------


def test_projection(example):
    """The projection is in the set, itself its projection, and closer than other points."""
    torch.manual_seed(0)
    x = 3 * torch.randn(64, example.dimension, dtype=torch.float64)
    y = example.project(x)
    assert example.contains(y).all()
    torch.testing.assert_close(example.project(y), y, atol=1e-10, rtol=0)
    inside = points_of(example, 64)
    torch.testing.assert_close(example.project(inside), inside, atol=1e-9, rtol=1e-9)
    # Optimality: (x - y) (z - y) <= 0 for every z of the set.
    assert (((x - y).unsqueeze(1) * (inside - y.unsqueeze(1))).sum(2) <= 1e-8 * (1 + inside.norm(dim=1))).all()


@pytest.mark.parametrize("name", ["checkerboard", "monotone", "convex", "cube", "random", "polytope", "unbounded",
                                  "independent, b", "apex elsewhere", "float64"])
def test_projection_agrees_with_enumeration_or_nnls(name):
    """Against a solver of another kind."""
    c = CONES[name]()
    x = 3 * torch.randn(40, c.dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    if len(c._a) <= 6:
        expected = [reference.project(c._a, c._b, v) for v in x.numpy()]
    else:
        apex = np.linalg.lstsq(c._a, c._b, rcond=None)[0]
        np.testing.assert_allclose(c._a @ apex, c._b, atol=1e-9)
        expected = [v - c._a.T @ nnls(c._a.T, v - apex)[0] for v in x.numpy()]
    np.testing.assert_allclose(c.project(x).numpy(), expected, atol=1e-9)


def test_projection_onto_the_simplex_and_the_box():
    x = 2 * torch.randn(200, 6, dtype=torch.float64)
    assert torch.equal(cone.box(6, -1, 0.5).project(x), x.clamp(-1, 0.5))
    # Sorting solution: Held, Wolfe and Crowder 1974.
    ordered = x.sort(1, descending=True).values
    excess = (ordered.cumsum(1) - 1) / torch.arange(1, 7)
    threshold = excess.gather(1, (ordered > excess).sum(1, keepdim=True) - 1)
    torch.testing.assert_close(cone.simplex(6).project(x), (x - threshold).relu(), atol=1e-12, rtol=0)


def capped_simplex(dimension, most):
    return Polyhedron(
        np.concatenate([-np.eye(dimension, dtype=int), np.eye(dimension, dtype=int)]),
        [0] * dimension + [most] * dimension, (np.ones((1, dimension)), [1]),
    )


@pytest.mark.parametrize("dimension", [20, 300])
@pytest.mark.parametrize("share", [1, 1.5, 7])
def test_projection_without_generators(dimension, share):
    """Onto a capped simplex, whose vertices nobody can count: clamp(x - t), t by bisection of the sum."""
    most = share / dimension
    c = capped_simplex(dimension, most)
    x = torch.randn(64, dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low, high = x.amin(1, keepdim=True) - most, x.amax(1, keepdim=True)
    for _ in range(100):
        middle = (low + high) / 2
        above = (x - middle).clamp(0, most).sum(1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    y = c.project(x)
    bound = sum_bound(dimension, float(x.abs().max()), torch.float64)  # of t, a mean over the coordinates
    torch.testing.assert_close(y, (x - low).clamp(0, most), atol=bound, rtol=0)
    assert c.contains(y).all()
    if dimension == 20 and share > 1:
        with pytest.raises(ValueError, match="to project alone, Polyhedron"):
            Cone(np.concatenate([-np.eye(20), np.eye(20)]), [0] * 20 + [most] * 20, (np.ones((1, 20)), [1]))
        assert torch.autograd.gradcheck(c.project, x[:4].requires_grad_())


def test_polyhedron_agrees_with_the_cone(example):
    a, b, e, f = example._a, example._b, example._e, example._f
    c = Polyhedron(a, b, (e, f) if len(e) else None)
    x = 3 * torch.randn(20, c.dimension, dtype=torch.float64)
    assert c.dimension == example.dimension
    assert torch.equal(c.project(x), example.project(x))
    assert torch.equal(c.violation(x), example.violation(x))
    assert torch.equal(c.contains(c.project(x)), torch.ones(20, dtype=torch.bool))


def test_projection_onto_a_row_between_bounds():
    """Two-sided, entries of both signs, open sides: against the active-set method on the same constraints."""
    rng = np.random.default_rng(3)
    row = np.array([1.0, -2, 3, -4, 0.5])
    rows = np.concatenate([[row, -row], np.eye(5)[:3], -np.eye(5)[1:4]])
    bounds = [2.0, 1, 0.5, 1, 2, 0.25, 0.5, 1]
    c = Polyhedron(rows, bounds)
    x = torch.from_numpy(3 * rng.standard_normal((200, 5)))
    y = c.project(x)
    torch.testing.assert_close(y, Projection(*c._unit)(x), rtol=0, atol=1e-13)
    expected = np.stack([reference.project(rows, np.array(bounds), v) for v in x[:20].numpy()])
    np.testing.assert_allclose(y[:20].numpy(), expected, rtol=0, atol=1e-12)


def test_scales_of_rows_change_nothing(example):
    """Powers of two whose squares are beyond the range of float64."""
    a, b, e, f = example._a, example._b, example._e, example._f
    rng = np.random.default_rng(0)
    by, by_equal = (2.0 ** rng.integers(-900, 900, len(part)) for part in (a, e))
    c = Polyhedron(a * by[:, None], b * by, (e * by_equal[:, None], f * by_equal) if len(e) else None)
    x = 3 * torch.randn(20, c.dimension, dtype=torch.float64)
    assert torch.equal(c.project(x), example.project(x))
    x = torch.cat([x, example.project(x)])
    assert torch.equal(c.contains(x), example.contains(x))


def test_scales_of_bounds_and_points():
    c = Cone([[1, 1], [1, -1]], [1e12, 0])  # a bound far away does not coarsen the other
    x = torch.tensor([[1.0, 0.0], [0.01, 0.005]], dtype=torch.float64)
    torch.testing.assert_close(c.project(x), x.mean(1, keepdim=True).expand(2, 2), rtol=0, atol=1e-15)
    x = torch.tensor([[1e300, 1.0], [1.0, 1e200]], dtype=torch.float64)
    assert cone.monotone(2).contains(x).tolist() == [False, True]
    torch.testing.assert_close(cone.monotone(2).project(x), x.new_tensor([[5e299, 5e299], [1.0, 1e200]]))
    x = torch.tensor([[math.inf, 5.0], [-math.inf, -1.0], [1e300, -1.0]], dtype=torch.float64)
    assert Cone([[0, 1]]).contains(x).tolist() == [False, False, True]
    assert Cone([[0, 1]]).contains(x, tolerance=0.0).tolist() == [False, False, True]


def test_projection_of_long_sequences():
    """200 dependent decisions a sample, against pool-adjacent-violators."""
    isotonic_regression = pytest.importorskip("sklearn.isotonic").isotonic_regression
    x = torch.randn(16, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = np.stack([isotonic_regression(row) for row in x.numpy()])
    np.testing.assert_allclose(cone.monotone(200).project(x).numpy(), expected, atol=1e-9)
    c = cone.convex(120)
    y = c.project(x[:, :120])
    assert c.contains(y).all()
    expected = np.stack([row - c._a.T @ nnls(c._a.T, row, maxiter=10000)[0] for row in x[:4, :120].numpy()])
    np.testing.assert_allclose(y[:4].numpy(), expected, atol=1e-7)


def test_projection_keeps_shape_and_type():
    c = Cone(cube_cone(4))
    x = torch.randn(2, 3, 4)
    assert c.project(x).shape == x.shape
    assert c.project(x.bfloat16()).dtype == torch.bfloat16
    assert c.project(x[:0]).shape == (0, 3, 4)
    torch.testing.assert_close(c.project(x)[1, 2], c.project(x[1, 2]))


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nonnegative", PHI)
def test_gradient_of_the_layer(example, nonnegative):
    """Away from beta = 0, where phi has a kink."""
    activation = ConeActivation(example, nonnegative).double()
    x = torch.randn(2, activation.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = (x + 0.1 * x.sign()).requires_grad_()
    assert torch.autograd.gradcheck(activation, x)
    assert torch.autograd.gradgradcheck(activation, x)


def test_gradient_of_the_box():
    activation = ConeActivation(cone.monotone(4), box=0.5).double()
    x = torch.tensor([[0.3, -0.7, 1.1, 0.2], [0.01, 0.02, -0.03, 0.01]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(activation, x)


def test_gradient_of_the_projection(example):
    x = 3 * torch.randn(4, example.dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert torch.autograd.gradcheck(example.project, x.requires_grad_(), atol=1e-6)


def test_gradient_of_the_coefficients():
    c = cone.monotone(5)
    x = torch.arange(5.0, dtype=torch.float64).square().expand(2, 5).clone().requires_grad_()
    assert torch.autograd.gradcheck(c.coefficients, x)


# --- layers in PyTorch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["dense", "gathered"])
def test_layer_equals_the_definition_in_both_layouts(example, share, monkeypatch):
    monkeypatch.setattr(layers, "LARGEST_WIDE_SHARE", share)
    activation = ConeActivation(example).double()
    assert (activation.source is not None) == (share == 1.0 or activation.rays.shape[1] == 0)
    x = torch.randn(3, 7, activation.in_features, dtype=torch.float64)
    rays, lines, _ = example.coefficient_counts
    alpha = [part.softmax(-1) for part in x[..., rays + lines :].split(example.vertex_groups, -1)]
    alpha = torch.cat([x[..., :0], *alpha], -1)
    # Unit rays orthogonal to the lines, which are orthonormal: any basis, so by projection.
    null = torch.linalg.svd(example.lines).Vh[: torch.linalg.matrix_rank(example.lines)]
    orthogonal = example.rays - example.rays @ null.T @ null
    along_rays = x[..., :rays].abs() @ (orthogonal / orthogonal.norm(dim=1, keepdim=True))
    beta, gamma, _ = activation.coefficients(x)
    expected = example.combine(torch.cat([beta, gamma, alpha], -1))
    torch.testing.assert_close(activation(x), expected)
    polytope = alpha @ example.vertex_generators.dense() + example.offset
    along_lines = expected - along_rays - polytope
    torch.testing.assert_close(along_lines @ null.T @ null, along_lines)
    torch.testing.assert_close(along_lines.norm(dim=-1), x[..., rays : rays + lines].norm(dim=-1))
    torch.testing.assert_close(activation(x[0, 0]), expected[0, 0])
    assert activation(x[:0]).shape == (0, 7, example.dimension)


@pytest.mark.parametrize("nonnegative", PHI)
@pytest.mark.parametrize("build", [cone.checkerboard, lambda: cone.monotone(60), lambda: cone.convex(40)])
def test_initialisation_keeps_the_variance(build, nonnegative):
    variances = []
    for seed in range(6):
        torch.manual_seed(seed)
        x = ConeLinear(64, build(), nonnegative)(torch.randn(1000, 64)).detach()
        variances.append(float(x.var(0).mean()))
    assert 0.85 < np.mean(variances) < 1.15


def test_state_dict_and_copies():
    layer = ConeLinear(6, cone.checkerboard(4, 4, 2))
    other = ConeLinear(6, cone.checkerboard(4, 4, 2))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 6)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert {"activation.rays", "activation.lines"} <= set(layer.state_dict())
    assert {name for name, _ in layer.named_parameters()} == {"linear.weight", "linear.bias"}


def test_state_of_another_cone_is_refused():
    layer = ConeLinear(6, cone.monotone(5))
    before = copy.deepcopy(layer.state_dict())
    other = ConeLinear(6, cone.monotone(5, decreasing=True))
    message = "activation.rays of the state belongs to another cone than Cone(dimension=5, rays=4, lines=1, vertices=0)"
    with pytest.raises(ValueError, match=re.escape(f"ConeActivation: {message}")):
        layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.activation.rays, before["activation.rays"])


def test_conversion_keeps_generators_exact():
    """They stay in float32 in a half-precision module; going through one loses nothing."""
    c = cone.convex(400)
    activation = ConeActivation(c)
    exact = activation.rays.clone()
    assert activation.bfloat16().rays.dtype == torch.float32
    assert torch.equal(activation.float().rays, exact)
    assert activation.double().rays.dtype == torch.float64
    assert torch.equal(activation.rays, c.rays)
    x = torch.randn(2, 400).bfloat16()
    assert torch.equal(activation.bfloat16()(x), activation.float()(x.float()).bfloat16())


def test_meta_device_and_to_empty():
    activation = ConeActivation(cone.monotone(5)).to("meta")
    assert activation(torch.randn(2, 5, device="meta")).shape == (2, 5)
    restored = activation.to_empty(device="cpu")
    assert torch.equal(restored.rays, ConeActivation(cone.monotone(5)).rays)


def test_the_default_device_and_type_are_those_of_the_parameters_alone(example):
    x = 3 * torch.randn(4, example.dimension)
    a, b, e, f = example._a, example._b, example._e, example._f
    y = example.project(x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            again = Cone(a, b, (e, f) if len(e) else None, exact=example.exact)
            assert torch.equal(again.project(x), y)
            assert again.contains(y).all()
            coefficients = again.coefficients(y)
            assert {part.device.type for part in (coefficients, again.rays, again.offset)} == {"cpu"}
            layer = ConeLinear(6, again)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {part.device.type for part in (*layer.parameters(), *layer.buffers())} == {"meta"}
    layer.to_empty(device="cpu").reset_parameters()
    assert torch.equal(layer.activation.rays, ConeActivation(again).rays)


@pytest.mark.parametrize("name", ["checkerboard", "monotone", "box", "simplex", "polytope"])
def test_compile(name):
    layer = ConeLinear(6, CONES[name]())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 6)
    torch.testing.assert_close(compiled(x), layer(x))
    expected = torch.autograd.grad(layer(x).square().sum(), layer.linear.weight)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), layer.linear.weight), expected)


def test_export_and_vmap():
    layer = ConeLinear(6, cone.checkerboard(4, 4, 2))
    x = torch.randn(5, 6)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))
    torch.testing.assert_close(torch.vmap(layer)(x), layer(x))


def _train_with_ddp(rank):
    torch.manual_seed(rank)
    layer = nn.parallel.DistributedDataParallel(ConeLinear(4, cone.checkerboard(4, 4, 2)))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    x = layer(torch.randn(50, 4)).detach()
    assert cone.checkerboard(4, 4, 2).contains(x).all()
    return layer.module.linear.weight.detach()


@needs_gloo
def test_distributed_data_parallel():
    first, second = run_in_two_processes(_train_with_ddp)
    assert torch.equal(first, second)


# --- description ------------------------------------------------------------------------------------------------------


def test_describe():
    assert cone.checkerboard().describe() == (
        "cone in R^784: 16 inequalities\n"
        "structure: 16 x single row\n"
        "generators: 16 rays, 768 lines (predicted at most 16 rays and vertices)\n"
        "entries: 0.252 % nonzero, ternary; certified in exact arithmetic"
    )
    assert "vertices in 1 group of 5" in cone.simplex(5).describe()
    assert "1 x double description" in Cone(cube_cone(4)).describe()


def test_contains():
    c = cone.monotone(3)
    x = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0], [2.0, 1.0, 3.0], [1.0, math.nan, 3.0]])
    assert c.contains(x).tolist() == [True, True, False, False]
    assert c.contains(x[2], tolerance=1.0).item()
    assert c.violation(x)[:3].tolist() == [0.0, 0.0, 1.0]
    x = torch.tensor([[0.25, 0.75], [0.5, 0.75], [-0.5, 1.5]])
    assert cone.simplex(2).contains(x).tolist() == [True, False, False]


# --- wrong calls ------------------------------------------------------------------------------------------------------


def test_too_many_rays_is_answered_at_once():
    """McMullen's bound refuses before double description begins."""
    matrix = random_cone(36, 12)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"^Cone: 3\d inequalities of rank 12 may have up to \d+ rays, more than "
                                         r"max_rays=100000; use fewer inequalities, a larger max_rays or, to project "
                                         r"alone, Polyhedron$"):
        Cone(matrix)
    assert time.perf_counter() - start < 5


def test_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ppl", None)
    with pytest.raises(ImportError) as raised:
        Cone(cube_cone(4))
    assert str(raised.value) == (
        'Cone: 6 dependent inequalities on 4 coordinates need double description: pip install "lowbit-ext[cone]"'
    )
    assert Cone(np.concatenate([np.eye(3), np.ones((1, 3))])).coefficient_counts == (3, 0, 0)


NAN = math.nan
C = cone.monotone(3)

WRONG_CALLS = {
    "only zero": (lambda: Cone([[1, 0], [-1, 0], [0, 1], [0, -1]]), ValueError,
                  "Cone: the constraints leave only the point x = 0"),
    "only zero by double description": (lambda: Cone([[1, 1], [-2, 1], [1, -3], [1, 0], [0, -1]]), ValueError,
                                        "Cone: the constraints leave only the point x = 0"),
    "one point": (lambda: Cone([[1.0]], [2], equality=([[1]], [1])), ValueError,
                  "Cone: the constraints leave only the point that they fix"),
    "no constraint": (lambda: Cone([[0, 0]]), ValueError,
                      "Cone: A has no row other than 0: there is nothing to constrain, x may be all of R^d"),
    "NaN": (lambda: Cone([[1, NAN]]), ValueError, "Cone: A must be finite, got nan at [0, 1]"),
    "infinite b": (lambda: Cone([[1, 2]], [math.inf]), ValueError, "Cone: b must be finite, got inf at [0]"),
    "huge A": (lambda: Cone([[10**400, 1]]), ValueError,
               f"Cone: A must be within the range of float64, got {10**400} at [0, 0]"),
    "tiny b": (lambda: Cone([[1, 1]], [Fraction(1, 10**400)]), ValueError,
               f"Cone: b must be within the range of float64, got 1/{10**400} at [0]"),
    "b of a tiny row": (lambda: Cone([[1e-300, 2e-300]], [1e300]), ValueError,
                        "Cone: b must be within the range of float64 in units of its row of A or E"),
    "generators out of range": (lambda: Cone([[1e-300, 1e300]]), ValueError,
                                "Cone: a number that follows from the constraints is beyond the range of float64"),
    "polyhedron without points": (lambda: Polyhedron([[1, 1], [-1, 0], [0, -1]], [-1, 0, 0]), ValueError,
                                  "Polyhedron: no x satisfies the constraints"),
    "polyhedron A": (lambda: Polyhedron([[1, NAN]]), ValueError, "Polyhedron: A must be finite, got nan at [0, 1]"),
    "activation of a polyhedron": (lambda: ConeActivation(Polyhedron([[1, 0]])), TypeError,
                                   "ConeActivation: cone must be a Cone, got Polyhedron"),
    "complex": (lambda: Cone([[1j]]), TypeError, "Cone: A must hold real numbers, got complex128"),
    "words": (lambda: Cone([[object()]]), TypeError,
              "Cone: A must hold integers, floats or fractions.Fraction, one number an entry"),
    "vector": (lambda: Cone([1, 2]), ValueError, "Cone: A must have 2 dimensions, got (2,)"),
    "b length": (lambda: Cone([[1, 2]], [1, 2]), ValueError, "Cone: b must have one number a row (1), got 2"),
    "E columns": (lambda: Cone([[1, 2]], equality=[[1]]), ValueError,
                  "Cone: equality must have as many columns as A (2), got 1"),
    "f length": (lambda: Cone([[1, 2]], equality=([[1, 0]], [1, 2])), ValueError,
                 "Cone: f of equality must have one number a row (1), got 2"),
    "equality tuple": (lambda: Cone([[1, 2]], equality=([[1, 0]],)), ValueError,
                       "Cone: equality must be E or a tuple (E, f), got a tuple of 1"),
    "max_rays": (lambda: Cone([[1, 2]], max_rays=0), ValueError, "Cone: max_rays must be at least 1, got 0"),
    "exact": (lambda: Cone([[1, 2]], exact="yes"), ValueError, "Cone: exact must be 'auto', True or False, got 'yes'"),
    "infeasible bounds": (lambda: Cone([[1], [-2]], [1, -4]), ValueError,
                          "Cone: no x satisfies A x <= b: two opposite rows leave no room, 2 <= a x <= 1"),
    "infeasible pair": (lambda: Cone([[1, 1], [-1, -1]], [1, -2]), ValueError,
                        "Cone: no x satisfies A x <= b: two opposite rows leave no room, 2 <= a x <= 1"),
    "infeasible": (lambda: Cone([[1, 1], [-1, 0], [0, -1]], [-1, 0, 0]), ValueError,
                   "Cone: no x satisfies A x <= b: the inequalities contradict one another"),
    "infeasible zero row": (lambda: Cone([[1, 1], [0, 0]], [0, -1]), ValueError,
                            "Cone: no x satisfies A x <= b: a zero row of A has the bound -1"),
    "infeasible equalities": (lambda: Cone([[1, 1]], equality=([[1, 0], [2, 0]], [1, 3])), ValueError,
                              "Cone: no x satisfies the equalities: they contradict one another"),
    "infeasible together": (lambda: Cone([[1, 1]], equality=([[1, 1]], [1])), ValueError,
                            "Cone: no x satisfies A x <= b together with the equalities"),
    "many independent rows": (lambda: Cone(-np.eye(8), max_rays=7), ValueError,
                              "Cone: the 8 groups of constraints may have up to 8 rays together, more than max_rays=7"),
    "project NaN": (lambda: C.project(torch.tensor([1.0, NAN, 2.0])), ValueError, "project: x holds NaN or infinity"),
    "project shape": (lambda: C.project(torch.ones(4)), ValueError,
                      "project: x must have 3 values in its last dimension, got (4,)"),
    "contains type": (lambda: C.contains(torch.ones(3, dtype=torch.int64)), TypeError,
                      "contains: x must be a floating-point tensor, got torch.int64"),
    "contains list": (lambda: C.contains([1.0]), TypeError, "contains: x must be a floating-point tensor, got list"),
    "coefficients outside": (lambda: C.coefficients(torch.tensor([[1.0, 2, 3], [1, 3, 2]])), ValueError,
                             "coefficients: x must be in the set: point 1 violates constraint 1; project it first"),
    "activation cone": (lambda: ConeActivation([[1, 0]]), TypeError, "ConeActivation: cone must be a Cone, got list"),
    "activation phi": (lambda: ConeActivation(C, "exp"), ValueError,
                       "ConeActivation: nonnegative must be one of 'abs', 'relu', 'square', 'softplus', got 'exp'"),
    "activation box": (lambda: ConeActivation(C, box=0), ValueError,
                       "ConeActivation: box must be a positive number, got 0"),
    "activation box, b": (lambda: ConeActivation(cone.simplex(3), box=1), ValueError,
                          "ConeActivation: box needs constraints with b = 0: others do not survive a division"),
    "activation shape": (lambda: ConeActivation(C)(torch.ones(2, 4)), ValueError,
                         "ConeActivation: x must have 3 values in the last dimension, got (2, 4)"),
    "activation type": (lambda: ConeActivation(C)(torch.ones(2, 3).double()), TypeError,
                        "ConeActivation: x is torch.float64, the module torch.float32: convert either"),
    "linear in_features": (lambda: ConeLinear(0, C), ValueError,
                           "ConeLinear: in_features must be at least 1, got 0"),
    "monotone": (lambda: cone.monotone(1), ValueError, "monotone: dimension must be at least 2, got 1"),
    "convex": (lambda: cone.convex(2.0), TypeError, "convex: dimension must be an int, got 2.0"),
    "checkerboard": (lambda: cone.checkerboard(28, 28, 5), ValueError,
                     "checkerboard: tile must be at least 2 and divide height and width, got 5 for 28 x 28"),
    "box length": (lambda: cone.box(2, [1, 2, 3]), ValueError, "box: low must be a number or 2 numbers, got [1, 2, 3]"),
    "box NaN": (lambda: cone.box(2, 0, NAN), ValueError, "box: high must hold numbers, not NaN or bools, got nan"),
    "box without bounds": (lambda: cone.box(2, -math.inf, math.inf), ValueError,
                           "box: low or high must be finite at one coordinate at least"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_call(name):
    call, error, message = WRONG_CALLS[name]
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message
