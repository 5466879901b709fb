"""graph_json.py, spec_json.py, json_values.py: round trips, and hostile or damaged JSON."""

from __future__ import annotations

import builtins
import json
import math
import operator
from collections import OrderedDict, defaultdict, deque, namedtuple

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.fx import Graph, GraphModule, Interpreter
from torch.utils import _pytree as pytree

from matryoshkafy.files import tree_json as spec_json
from matryoshkafy.files.graph_json import (
    FUNCTIONS,
    callables,
    graph_from_json,
    graph_to_json,
    spec_from_json,
    spec_to_json,
)
from matryoshkafy.files.json_text import JsonError, parse_json
from matryoshkafy.graph.nodes import TensorInfo, info_of, source_of

Point = namedtuple("Point", ["x", "y"])


def through_text(saved):
    return parse_json(json.dumps(saved, allow_nan=False).encode(), "the graph")


def round_trip(graph, **allowed):
    return graph_from_json(
        through_text(graph_to_json(graph, callables(**allowed))), callables(**allowed)
    )


def export(model, args, kwargs=None, **options):
    return torch.export.export(model.eval(), args, kwargs, strict=False, **options)


def run(graph, program, args, kwargs):
    state = {**program.state_dict, **program.constants}
    leaves = pytree.tree_leaves((args, kwargs))
    signature = program.graph_signature
    lifted = (
        signature.inputs_to_parameters
        | signature.inputs_to_buffers
        | signature.inputs_to_lifted_tensor_constants
    )
    kept = [state[lifted[n.name]] for n in graph.nodes if n.name in lifted]
    inputs = [*kept, *leaves]
    return Interpreter(GraphModule(nn.Module(), graph)).run(*inputs)


class Scalars(nn.Module):
    """Arithmetic on symbolic sizes, infinities, dtypes and devices."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.arange(12.0).view(3, 4))

    def forward(self, x, *, scale):
        rows = x.shape[0] // 2 + math.ceil(x.shape[0] / 3)
        mask = torch.full((rows, rows), float("-inf"), device=x.device, dtype=torch.float32)
        y = (x @ self.table.T).to(torch.float64).softmax(-1) * (x.shape[0] ** 0.5)
        return {"mask": mask.triu(1), "pair": (y[1:, ..., None], [x.sum() * scale, None])}


class Convolutions(nn.Module):
    """A module list, a batch norm and a split: integer path parts, several outputs of one node."""

    def __init__(self):
        super().__init__()
        self.stack = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU())
        self.named = nn.ModuleDict({"en-US": nn.LSTM(8, 4, batch_first=True)})

    def forward(self, x):
        left, right = self.stack(x).flatten(2).transpose(1, 2).chunk(2, dim=1)
        return self.named["en-US"](left)[0] + torch.topk(right, 4).values


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=30,
        max_position_embeddings=20,
    )
    return transformers.BertModel(config)


CASES = {
    "scalars": lambda: (
        Scalars(),
        (torch.randn(4, 4),),
        {"scale": 2.5},
        {"x": {0: Dim("n", min=3, max=64)}, "scale": None},
    ),
    "convolutions": lambda: (Convolutions(), (torch.randn(2, 3, 6, 6),), {}, None),
    "bert": lambda: (bert(), (torch.randint(0, 30, (2, 5)),), {}, None),
}


@pytest.mark.filterwarnings("ignore:The tensor attributes self.named")
@pytest.mark.parametrize("case", CASES)
def test_a_graph_comes_back_as_it_was(case):
    model, args, kwargs, dynamic = CASES[case]()
    program = export(model, args, kwargs, dynamic_shapes=dynamic)
    again = round_trip(program.graph)
    assert str(again) == str(program.graph)
    assert graph_to_json(again) == graph_to_json(program.graph)
    for node, original in zip(again.nodes, program.graph.nodes, strict=True):
        assert node.target is original.target or node.target == original.target
        assert info_of(node) == info_of(original.meta.get("val"))
        assert node.meta.get("source") == source_of(original)
    expected, found = (run(g, program, args, kwargs) for g in (program.graph, again))
    for one, other in zip(found, expected, strict=True):
        assert one is other is None or torch.equal(one, other)
    spec = program.module_call_graph[0].signature.out_spec
    assert spec_from_json(through_text(spec_to_json(spec))) == spec


def test_shapes_are_concrete_and_sources_name_the_users_line():
    model, args, kwargs, dynamic = CASES["scalars"]()
    graph = round_trip(export(model, args, kwargs, dynamic_shapes=dynamic).graph)
    nodes = {node.name: node for node in graph.nodes}
    assert info_of(nodes["x"]) == TensorInfo((4, 4), torch.float32)
    assert info_of(nodes["softmax"]) == TensorInfo((4, 3), torch.float64)
    (size,) = [n for n in graph.nodes if n.target is torch.ops.aten.sym_size.int]
    assert info_of(size) == 4 and type(info_of(size)) is int
    assert nodes["softmax"].meta["source"].startswith(f"{__file__}:")
    assert nodes["softmax"].meta["source"].endswith("(forward)")


ARGUMENTS = [
    None,
    True,
    False,
    0,
    -7,
    2**70,
    0.1,
    -0.0,
    1e-320,
    1e308,
    math.inf,
    -math.inf,
    1 + 2j,
    complex(math.inf, -0.0),
    "",
    'quote " \\ \n é',
    [],
    [1, [2.0, None]],
    (),
    (1, (2,)),
    {"a": 1, "b": [2]},
    {1: (2,)},
    slice(None),
    slice(1, None, 2),
    range(0, 9, 2),
    ...,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.device("cpu"),
    torch.device("cuda:1"),
    torch.strided,
    torch.sparse_csr,
    torch.channels_last,
    torch.preserve_format,
]


@pytest.mark.parametrize("value", ARGUMENTS, ids=repr)
def test_every_type_of_argument_comes_back_exactly(value):
    graph = Graph()
    x = graph.placeholder("x")
    y = graph.call_function(operator.add, (x, value), {})
    graph.output([y, {"out": (x, value)}])
    again = round_trip(graph)
    found = list(again.nodes)[1].args[1]
    assert found == value and type(found) is type(y.args[1]) and repr(found) == repr(value)
    assert str(again) == str(graph)
    assert list(again.nodes)[-1].args[0][1]["out"][0] is list(again.nodes)[0]


def test_nan_and_numpy_floats_come_back():
    numpy = pytest.importorskip("numpy")
    graph = Graph()
    graph.output((math.nan, numpy.float64(0.5), torch.Size([2, 3])))
    nan, half, size = list(round_trip(graph).nodes)[0].args[0]
    assert math.isnan(nan) and half == 0.5 and size == (2, 3)


def test_names_that_shadow_builtins_and_parameter_paths_stay():
    graph = Graph()
    x = graph.placeholder("input")
    x.name = "input"
    graph.get_attr("layers.0.en-US.weight")
    graph.output(graph.call_function(builtins.getattr, (x, "dtype")))
    again = round_trip(graph)
    assert [n.name for n in again.nodes] == [n.name for n in graph.nodes]
    assert [n.target for n in again.nodes] == [n.target for n in graph.nodes]


def test_every_scalar_function_is_found_by_its_own_name():
    for name, function in FUNCTIONS.items():
        graph = Graph()
        args = ("dtype",) if function is getattr else ()
        graph.output(graph.call_function(function, (graph.placeholder("x"), *args)))
        assert (
            next(n for n in round_trip(graph).nodes if n.op == "call_function").target is function
        )
        assert name.rpartition(".")[2] in dir(__import__(name.partition(".")[0]))


def test_a_callers_own_operators_and_functions_need_leave():
    with torch.library._scoped_library("mytestlib", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        graph = Graph()
        x = graph.call_function(torch.ops.mytestlib.twice.default, (graph.placeholder("x"),))
        graph.output(graph.call_function(math.erf, (x,)))
        given = {"namespaces": ["mytestlib"], "functions": {"math.erf": math.erf}}
        assert str(round_trip(graph, **given)) == str(graph)
        with pytest.raises(JsonError, match="namespace 'mytestlib'"):
            round_trip(graph, functions=given["functions"])
        with pytest.raises(JsonError, match="math.erf"):
            graph_to_json(graph, callables(["mytestlib"]))


UNSAVEABLE = {
    "call_module": lambda g, x: g.call_module("layer", (x,)),
    "call_method": lambda g, x: g.call_method("relu", (x,)),
    "python function": lambda g, x: g.call_function(torch.nn.functional.relu, (x,)),
    "lambda": lambda g, x: g.call_function(lambda y: y, (x,)),
    "higher order": lambda g, x: g.call_function(torch.ops.higher_order.cond, (x,)),
    "packet": lambda g, x: g.call_function(torch.ops.aten.add, (x,)),
    "tensor": lambda g, x: g.call_function(operator.add, (x, torch.ones(2))),
    "generator": lambda g, x: g.call_function(operator.add, (x, torch.Generator())),
    "named tuple": lambda g, x: g.call_function(operator.add, (x, Point(1, 2))),
    "getattr": lambda g, x: g.call_function(getattr, (x, "__class__")),
    "save": lambda g, x: g.call_function(torch.ops.aten.save.default, (x, "f")),
}


@pytest.mark.parametrize("case", UNSAVEABLE)
def test_what_cannot_be_saved_is_refused_at_the_save(case):
    graph = Graph()
    graph.output(UNSAVEABLE[case](graph, graph.placeholder("x")))
    with pytest.raises(JsonError, match="node '"):
        graph_to_json(graph)


def node(**changes):
    record = {"name": "y", "op": "call_function", "target": "aten.relu.default", "args": ["x"]}
    return {**record, **changes}


def nested(depth, make=lambda inner: [inner]):
    value = 1
    for _ in range(depth):
        value = make(value)
    return value


INJECTION = "x): pass\nimport os; os.system('true')\ndef f("
HOSTILE = {
    "unknown namespace": node(target="os.system.default"),
    "python import": node(target="os.system"),
    "builtins": node(target="builtins.eval"),
    "builtins exec": node(target="builtins.exec"),
    "operator outside the table": node(target="operator.methodcaller"),
    "saves a file": node(target="aten.save.default", args=["x", {"str": "f"}]),
    "maps a file": node(target="aten.from_file.default", args=[{"str": "/etc/passwd"}]),
    "changes global state": node(target="aten.set_grad_enabled.default", args=[False]),
    "prints": node(target="aten._print.default", args=[{"str": "hello"}]),
    "unknown op": node(target="aten.no_such_thing.default"),
    "unknown overload": node(target="aten.relu.nope"),
    "dunder op": node(target="aten.__class__.default"),
    "dunder overload": node(target="aten.relu.__init__"),
    "target with code": node(target=f"aten.relu.{INJECTION}"),
    "target not text": node(target=["aten", "relu"]),
    "no target": node(target=None),
    "long target": node(target="a" * 100_000),
    "getattr of a dunder": node(target="builtins.getattr", args=["x", {"str": "__class__"}]),
    "getattr with a default": node(target="builtins.getattr", args=["x", {"str": "dtype"}, 1]),
    "getattr by keyword": node(target="builtins.getattr", args=[], kwargs={"a": 1, "b": 2}),
    "getattr of a node": node(target="builtins.getattr", args=["x", "x"]),
    "getattr of a list": node(target="builtins.getattr", args=["x", [1]]),
    "name with code": node(name=INJECTION),
    "name is a keyword": node(name="lambda"),
    "name empty": node(name=""),
    "name not text": node(name=3),
    "name long": node(name="a" * 1000),
    "name taken": node(name="x"),
    "name not ascii": node(name="ｘ"),
    "unknown op kind": node(op="call_module", target="layer"),
    "op kind not text": node(op=["output"]),
    "placeholder with code": node(op="placeholder", target=INJECTION, args=[]),
    "placeholder with three stars": node(op="placeholder", target="***x", args=[]),
    "placeholder is a keyword": node(op="placeholder", target="def", args=[]),
    "get_attr with code": node(op="get_attr", target='w", __import__("os")) + ("', args=[]),
    "get_attr with a line break": node(op="get_attr", target="w\nimport os", args=[]),
    "get_attr of a dunder": node(op="get_attr", target="w.__class__.__base__", args=[]),
    "get_attr with an empty part": node(op="get_attr", target="a..b", args=[]),
    "get_attr with a backslash": node(op="get_attr", target="a\\", args=[]),
    "keyword argument with code": node(kwargs={INJECTION: 1}),
    "keyword argument is a keyword": node(kwargs={"lambda": 1}),
    "args no list": node(args={"tuple": []}),
    "no args": node(args=None),
    "kwargs no object": node(kwargs=[1]),
    "later node": node(args=["z"]),
    "itself": node(args=["y"]),
    "unknown tag": node(args=[{"pickle": "gASV"}]),
    "two tags": node(args=[{"str": "a", "tuple": []}]),
    "empty object": node(args=[{}]),
    "text not text": node(args=[{"str": 1}]),
    "text long": node(args=[{"str": "a" * 20_000}]),
    "dtype is a module": node(args=[{"dtype": "nn"}]),
    "dtype is code": node(args=[{"dtype": "float32()"}]),
    "dtype not text": node(args=[{"dtype": [1]}]),
    "layout is a dtype": node(args=[{"layout": "float32"}]),
    "device unknown": node(args=[{"device": "toaster:0"}]),
    "device not text": node(args=[{"device": 0}]),
    "float is a text": node(args=[{"float": "1.0"}]),
    "float unhashable": node(args=[{"float": []}]),
    "complex of three": node(args=[{"complex": [1.0, 2.0, 3.0]}]),
    "complex of text": node(args=[{"complex": [{"str": "1"}, 2.0]}]),
    "slice of four": node(args=[{"slice": [1, 2, 3, 4]}]),
    "range of floats": node(args=[{"range": [0.5, 1, 1]}]),
    "range of step 0": node(args=[{"range": [0, 1, 0]}]),
    "dict of nodes": node(args=[{"dict": [["x", 1]]}]),
    "dict of lists": node(args=[{"dict": [[[1], 1]]}]),
    "dict with a key twice": node(args=[{"dict": [[1, 1], [1, 2]]}]),
    "dict of triples": node(args=[{"dict": [[1, 1, 1]]}]),
    "deep lists": node(args=[nested(100)]),
    "deep tuples": node(args=[nested(100, lambda inner: {"tuple": [inner]})]),
    "deep shape": node(shape=nested(100)),
    "shape of text": node(shape={"shape": ["2"], "dtype": "float32"}),
    "shape of booleans": node(shape={"shape": [True], "dtype": "float32"}),
    "shape negative": node(shape={"shape": [-2], "dtype": "float32"}),
    "shape huge": node(shape={"shape": [2**63], "dtype": "float32"}),
    "shape without dtype": node(shape={"shape": [2]}),
    "shape of no dtype": node(shape={"shape": [2], "dtype": "load"}),
    "shape is a node": node(shape="x"),
    "source with a line break": node(source="a.py:1\nimport os"),
    "source not text": node(source=1),
    "no object": "y",
    "null": None,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_nodes_are_refused_with_a_line(case):
    x = {"name": "x", "op": "placeholder", "target": "x", "args": []}
    out = {"name": "output", "op": "output", "target": "output", "args": [["x"]]}
    assert graph_from_json({"format": 1, "nodes": [x, node(), out]})
    with pytest.raises(JsonError) as caught:
        graph_from_json({"format": 1, "nodes": [x, HOSTILE[case], out]})
    assert len(str(caught.value)) < 500


X = {"name": "x", "op": "placeholder", "target": "x", "args": []}
OUT = {"name": "output", "op": "output", "target": "output", "args": [["x"]]}


@pytest.mark.parametrize(
    "saved",
    [
        None,
        [],
        "graph",
        {},
        {"format": 1},
        {"format": 1, "nodes": {}},
        {"nodes": [X, OUT]},
        {"format": 2, "nodes": [X, OUT]},
        {"format": [1], "nodes": [X, OUT]},
        {"format": 1, "nodes": []},
        {"format": 1, "nodes": [X]},
        {"format": 1, "nodes": [X, OUT, OUT]},
        {"format": 1, "nodes": [OUT, X]},
        {"format": 1, "nodes": [X, OUT, {**OUT, "name": "o2"}]},
        {"format": 1, "nodes": [X, OUT, {**X, "name": "x2"}]},
    ],
    ids=repr,
)
def test_json_that_is_no_graph_is_refused(saved):
    with pytest.raises(JsonError):
        graph_from_json(saved)


def test_a_newer_format_says_to_upgrade():
    with pytest.raises(JsonError, match="format 2.*Upgrade matryoshkafy"):
        graph_from_json({"format": 2, "nodes": [X, OUT]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 1_000_000, "nested too deeply"),
        (b'{"a":' * 1_000_000, "nested too deeply|more values than"),
        (b"[" * 500 + b"]" * 500, None),
        (b'{"a": 1, "a": 2}', "repeats a key"),
        (b'{"a": NaN}', "NaN"),
        (b"[Infinity]", "Infinity"),
        (b"9" * 10_000, "no sound JSON"),
        (b"\xff\xfe", "no sound JSON"),
        (b"", "no sound JSON"),
        (b'{"a": 1', "no sound JSON"),
        (b"\x80\x04\x95\x0c\x00", "no sound JSON"),
        (b"PK\x03\x04", "no sound JSON"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_json_bombs_end_in_a_message(text, message):
    if message is None:
        with pytest.raises(JsonError):
            graph_from_json({"format": 1, "nodes": parse_json(text, "the file")})
        return
    with pytest.raises(JsonError, match=message):
        parse_json(text, "the file")


STRUCTURES = [
    1,
    (),
    [],
    {},
    (1, [2, {"a": 3, 4: (5,)}]),
    OrderedDict(b=1, a=2),
    deque([1, 2], maxlen=3),
    deque([1]),
    defaultdict(list, {"a": 1}),
    {("a", 1): 2, None: 3, 0.5: 4, True: 5},
    torch.return_types.max((torch.ones(1), torch.ones(1))),
    ((1,), {"x": None}),
]


@pytest.mark.parametrize("tree", STRUCTURES, ids=lambda tree: repr(tree)[:40])
def test_structures_come_back(tree):
    leaves, spec = pytree.tree_flatten(tree)
    again = spec_from_json(through_text(spec_to_json(spec)))
    assert again == spec
    rebuilt = again.unflatten(leaves)
    assert type(rebuilt) is type(tree)
    assert rebuilt == tree or isinstance(leaves[0], torch.Tensor)


def test_a_named_tuple_comes_back_as_a_class_of_the_same_name_and_fields():
    spec = pytree.tree_structure({"p": Point(1, (2, 3))})
    again = spec_from_json(through_text(spec_to_json(spec)))
    point = again.unflatten([1, 2, 3])["p"]
    assert point == (1, (2, 3)) and type(point).__name__ == "Point"
    assert point._fields == ("x", "y")
    assert spec_from_json(spec_to_json(again)) == again


def test_transformers_outputs_come_back_or_become_dictionaries(monkeypatch):
    outputs = pytest.importorskip("transformers.modeling_outputs")
    tree = outputs.BaseModelOutput(last_hidden_state=torch.ones(2), hidden_states=(torch.ones(1),))
    leaves, spec = pytree.tree_flatten(tree)
    saved = through_text(spec_to_json(spec))
    assert spec_from_json(saved) == spec
    assert isinstance(spec_from_json(saved).unflatten(leaves), outputs.BaseModelOutput)
    monkeypatch.setattr(spec_json, "_model_output_base", lambda: None)
    assert spec_from_json(saved).type is dict
    assert list(spec_from_json(saved).unflatten(leaves)) == ["last_hidden_state", "hidden_states"]


def test_a_users_own_output_class_becomes_a_dictionary():
    generic = pytest.importorskip("transformers.utils.generic")
    from dataclasses import dataclass

    @dataclass
    class Mine(generic.ModelOutput):
        score: torch.Tensor | None = None

    saved = spec_to_json(pytree.tree_structure(Mine(score=torch.ones(1))))
    assert spec_from_json(saved).unflatten([7]) == {"score": 7}


def test_unknown_containers_are_refused_by_name():
    class Cache:
        pass

    pytree.register_pytree_node(Cache, lambda c: ([1], None), lambda values, context: Cache())
    with pytest.raises(JsonError, match="Cache, which cannot be saved.*use_cache=False"):
        spec_to_json(pytree.tree_structure((Cache(),)))
    with pytest.raises(JsonError, match="defaultdict"):
        spec_to_json(pytree.tree_structure(defaultdict(Cache, {"a": 1})))


LEAF = None


@pytest.mark.parametrize(
    "saved",
    [
        1,
        "leaf",
        [],
        {},
        {"type": "tuple"},
        {"type": "tuple", "children": {}},
        {"type": "set", "children": []},
        {"type": ["tuple"], "children": []},
        {"type": "tuple", "context": 1, "children": []},
        {"type": "dict", "children": [LEAF]},
        {"type": "dict", "context": [], "children": [LEAF]},
        {"type": "dict", "context": [1, 1], "children": [LEAF, LEAF]},
        {"type": "dict", "context": [[1]], "children": [LEAF]},
        {"type": "dict", "context": ["node"], "children": [LEAF]},
        {"type": "deque", "context": 0, "children": [LEAF]},
        {"type": "deque", "context": "x", "children": []},
        {"type": "defaultdict", "context": {"factory": "eval", "keys": []}, "children": []},
        {"type": "defaultdict", "context": None, "children": []},
        {"type": "namedtuple", "context": {"name": "P", "fields": ["x"]}, "children": []},
        {
            "type": "namedtuple",
            "context": {"name": "P", "fields": ["x", "x"]},
            "children": [LEAF, LEAF],
        },
        {"type": "namedtuple", "context": {"name": "P", "fields": ["_x"]}, "children": [LEAF]},
        {
            "type": "namedtuple",
            "context": {"name": "P", "fields": ["x = exit()"]},
            "children": [LEAF],
        },
        {"type": "namedtuple", "context": {"name": "P()", "fields": []}, "children": []},
        {"type": "return_type", "context": "sys", "children": []},
        {"type": "return_type", "context": "max", "children": [LEAF]},
        {"type": "model_output", "context": None, "children": []},
        {
            "type": "model_output",
            "context": {"module": "os", "name": "system", "keys": []},
            "children": [],
        },
        {
            "type": "model_output",
            "children": [],
            "context": {
                "module": "transformers.models.bert.convert_bert",
                "name": "main",
                "keys": [],
            },
        },
        {
            "type": "model_output",
            "children": [],
            "context": {
                "module": "transformers.modeling_outputs",
                "name": "torch.load",
                "keys": [],
            },
        },
        {
            "type": "model_output",
            "children": [LEAF],
            "context": {
                "module": "transformers.modeling_outputs",
                "name": "BaseModelOutput",
                "keys": [],
            },
        },
        nested(100, lambda inner: {"type": "list", "children": [inner] if inner != 1 else []}),
    ],
    ids=lambda saved: repr(saved)[:60],
)
def test_hostile_structures_are_refused(saved):
    with pytest.raises(JsonError):
        spec_from_json(saved)


@pytest.mark.parametrize("name", ["torch", "warnings", "NoSuchOutput", "dataclass"])
def test_a_name_that_is_no_output_class_becomes_a_dictionary(name):
    context = {"module": "transformers.modeling_outputs", "name": name, "keys": [{"str": "a"}]}
    saved = {"type": "model_output", "context": context, "children": [None]}
    assert spec_from_json(saved).type is dict
