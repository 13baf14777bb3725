"""A TFC-TDF U-Net read back out of its exported graph, and graphs that are something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
from conftest import decibels
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from kmdx.errors import WeightsError
from kmdx.networks.spectrogram import SpectrogramConfig
from kmdx.networks.tfc_tdf import TfcTdf, TfcTdfConfig
from kmdx.weights import onnx_unet

SPECTROGRAM = SpectrogramConfig(**tiny.TRANSFORM)
SPECTRUM_SHAPE = (4, SPECTROGRAM.bins, SPECTROGRAM.frames)
NEEDED = 100  # dB


def with_norms_of_its_own(network: TfcTdf) -> TfcTdf:
    """Batch norms with random affine parameters and statistics, so that none can stand for another."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.2, 0.2)
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def network() -> TfcTdf:
    return with_norms_of_its_own(tiny.unet("vocals", None, seed=5))


@pytest.fixture(scope="module")
def exported(network: TfcTdf, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("exported") / "vocals.onnx"
    export(network, path, forward(network, swaps_outside=False))
    return path.read_bytes()


@pytest.fixture
def model(exported: bytes) -> ModelProto:
    """The graph as the published training code exports it, to be changed."""
    return onnx.load_model_from_string(exported)


def export(network: TfcTdf, path: Path, way: Callable[[Tensor], Tensor], **options) -> None:
    example = (torch.zeros(1, *SPECTRUM_SHAPE),)
    own, network.forward = network.forward, way
    names = {"input_names": ["input"], "output_names": ["output"]}
    torch.onnx.export(network, example, str(path), opset_version=13, dynamo=False, **names, **options)
    network.forward = own


def forward(network: TfcTdf, swaps_outside: bool) -> Callable[[Tensor], Tensor]:
    """The U-Net; time and frequency are swapped outside the 1×1 convolutions, or between them as published."""

    def run(x: Tensor) -> Tensor:
        x = (
            network.first_conv(x.transpose(-1, -2))
            if swaps_outside
            else network.first_conv(x).transpose(-1, -2)
        )
        skips = []
        for block, down in zip(network.encoding_blocks, network.ds, strict=True):
            x = block(x)
            skips.append(x)
            x = down(x)
        x = network.bottleneck_block(x)
        for up, block in zip(network.us, network.decoding_blocks, strict=True):
            x = block(up(x) * skips.pop())
        return (
            network.final_conv(x).transpose(-1, -2)
            if swaps_outside
            else network.final_conv(x.transpose(-1, -2))
        )

    return run


def spectrum(batch: int = 1) -> Tensor:
    return torch.randn(batch, *SPECTRUM_SHAPE, generator=torch.Generator().manual_seed(8))


def rebuilt(graph: onnx_unet.UnetGraph) -> TfcTdf:
    network = TfcTdf(TfcTdfConfig(SPECTROGRAM, **graph.sizes), "vocals")
    network.load(graph.state)
    return network.eval()


@torch.inference_mode()
def estimate(network: TfcTdf, batch: int = 1) -> Tensor:
    return network.unet(spectrum(batch))


def onnx_estimate(model: ModelProto) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"input": spectrum().numpy()})[0]


def operations(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def nth(model: ModelProto, operation: str, number: int) -> NodeProto:
    return [node for node in model.graph.node if node.op_type == operation][number]


def test_a_graph_with_nan_is_refused(model: ModelProto) -> None:
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    weight.raw_data = np.float32("nan").tobytes() + weight.raw_data[4:]
    with pytest.raises(WeightsError, match="holds NaN or infinity"):
        onnx_unet.unet(model)


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "fixed"])
def test_an_exported_graph_is_converted_back_to_its_network(
    network: TfcTdf, dynamic: bool, tmp_path: Path
) -> None:
    tiny.export(network, tmp_path / "vocals.onnx", dynamic)
    graph = onnx_unet.unet(tmp_path / "vocals.onnx")

    config = network.config
    assert TfcTdfConfig(SPECTROGRAM, **graph.sizes) == config
    assert (graph.bins, graph.frames) == (SPECTROGRAM.bins, SPECTROGRAM.frames)
    again = rebuilt(graph)
    assert decibels(estimate(network, 2), estimate(again, 2)) > NEEDED
    assert decibels(onnx_estimate(onnx.load(tmp_path / "vocals.onnx")), estimate(again)) > NEEDED


def test_the_state_has_the_layout_of_the_networks_own(network: TfcTdf, model: ModelProto) -> None:
    state, own = onnx_unet.unet(model).state, network.state_dict()
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in own.items()
    }
    kept = [name for name in own if ".tdf." in name or name.startswith(("us.", "final_conv."))]
    assert all(torch.equal(state[name], own[name]) for name in kept), "what was not folded is as it was"


def test_a_folded_norm_becomes_an_identity_norm(model: ModelProto) -> None:
    variance = onnx_unet.unet(model).state["first_conv.1.running_var"]
    norm = nn.BatchNorm2d(len(variance)).eval()
    norm.running_var.copy_(variance)
    x = spectrum()[:, : len(variance)]
    assert torch.equal(norm(x), x)


@pytest.mark.parametrize("swaps_outside", [True, False])
def test_axes_may_be_swapped_in_either_place(network: TfcTdf, swaps_outside: bool, tmp_path: Path) -> None:
    export(network, tmp_path / "vocals.onnx", forward(network, swaps_outside))
    order = operations(onnx.load(tmp_path / "vocals.onnx"))
    assert order[:3] == (["Transpose", "Conv", "Relu"] if swaps_outside else ["Conv", "Relu", "Transpose"])
    again = rebuilt(onnx_unet.unet(tmp_path / "vocals.onnx"))
    assert decibels(estimate(network), estimate(again)) > NEEDED


@pytest.mark.parametrize("sizes", [(3, 1, 2, 4), (7, 2, 3, 16), (3, 4, 5, 8)])
def test_other_sizes_are_read_from_the_graph(sizes: tuple[int, ...], tmp_path: Path) -> None:
    layers, convolutions, growth, bottleneck = sizes
    config = TfcTdfConfig(SPECTROGRAM, layers, convolutions, growth, None, bottleneck)
    network = with_norms_of_its_own(TfcTdf(config, "vocals"))
    tiny.export(network, tmp_path / "vocals.onnx")
    again = rebuilt(onnx_unet.unet(tmp_path / "vocals.onnx"))
    assert again.config == config
    assert decibels(estimate(network), estimate(again)) > NEEDED


@pytest.mark.filterwarnings("ignore:It is recommended that constant folding")
@pytest.mark.parametrize(
    "options",
    [
        {"do_constant_folding": False},
        {"training": torch.onnx.TrainingMode.PRESERVE},
        {"keep_initializers_as_inputs": True},
    ],
    ids=["nothing folded", "norms not folded", "parameters as inputs"],
)
def test_other_kinds_of_export_are_read(network: TfcTdf, options: dict, tmp_path: Path) -> None:
    export(network, tmp_path / "vocals.onnx", network.unet, **options)
    norms = operations(onnx.load(tmp_path / "vocals.onnx")).count("BatchNormalization")
    assert norms == (12 if "keep_initializers_as_inputs" in options else 20)
    graph = onnx_unet.unet(tmp_path / "vocals.onnx")
    assert decibels(estimate(network), estimate(rebuilt(graph))) > NEEDED
    if norms == 20:
        assert all(torch.equal(graph.state[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("epsilon", [1e-3, 1e-7, None])
def test_another_epsilon_is_added_to_the_variance(epsilon: float | None, model: ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            others = [attribute for attribute in node.attribute if attribute.name != "epsilon"]
            del node.attribute[:]
            node.attribute.extend(others)
            if epsilon is not None:  # None leaves it to the standard, which says 1e-5
                node.attribute.append(helper.make_attribute("epsilon", epsilon))
    again = rebuilt(onnx_unet.unet(model))
    assert decibels(onnx_estimate(model), estimate(again)) > NEEDED


def test_a_parameter_may_be_a_constant_node(network: TfcTdf, model: ModelProto) -> None:
    (weight,) = [w for w in model.graph.initializer if w.name == nth(model, "MatMul", 0).input[1]]
    model.graph.node.insert(0, helper.make_node("Constant", [], [weight.name], value=weight))
    model.graph.initializer.remove(weight)
    assert decibels(estimate(network), estimate(rebuilt(onnx_unet.unet(model)))) > NEEDED


def test_nodes_that_change_nothing_are_ignored(network: TfcTdf, model: ModelProto) -> None:
    for number, (operation, attributes) in enumerate([("Identity", {}), ("Cast", {"to": TensorProto.FLOAT})]):
        for heard in (
            nth(model, "Add", number),
            nth(model, "Relu", number),
            nth(model, "ConvTranspose", number),
        ):
            passed_on = f"{heard.output[0]} passed on"
            for user in model.graph.node:
                user.input[:] = [passed_on if name == heard.output[0] else name for name in user.input]
            place = list(model.graph.node).index(heard) + 1
            model.graph.node.insert(
                place, helper.make_node(operation, [heard.output[0]], [passed_on], **attributes)
            )
    model.graph.node.append(helper.make_node("Identity", ["output"], ["passed on"]))
    model.graph.output[0].name = "passed on"
    again = rebuilt(onnx_unet.unet(model))
    assert decibels(estimate(network), estimate(again)) > NEEDED
    assert decibels(onnx_estimate(model), estimate(again)) > NEEDED


# One change each to the graph as it is exported, and what the refusal must say.


def skip_is_added(model: ModelProto) -> str:
    nth(model, "Mul", 0).op_type = "Add"
    return "goes into Add, not into one Mul"


def skip_is_multiplied_by_itself(model: ModelProto) -> str:
    node = nth(model, "Mul", 1)
    node.input[:] = [node.input[0]] * 2
    return "goes into Mul, Mul, not into one Mul"


def skip_is_taken_before_the_frequency_layers(model: ModelProto) -> str:
    nth(model, "Mul", 1).input[1] = nth(model, "Add", 0).input[0]
    return "is of .* and .*, not of"


def frequency_layers_are_added_to_the_blocks_input(model: ModelProto) -> str:
    nth(model, "Add", 0).input[0] = nth(model, "Transpose", 0).output[0]
    return "goes into MatMul, not into one Add"


def frequency_layers_are_multiplied(model: ModelProto) -> str:
    nth(model, "Add", 2).op_type = "Mul"
    return "not into one Add"


def rectifier_is_gone(model: ModelProto) -> str:
    leave_out(model, nth(model, "Relu", 1))
    return "goes into MatMul, Add, not into one BatchNormalization"


def precision_is_halved_in_between(model: ModelProto) -> str:
    rectified = nth(model, "Relu", 0).output[0]
    model.graph.node.append(helper.make_node("Cast", [rectified], ["half"], to=TensorProto.FLOAT16))
    model.graph.node.append(helper.make_node("Cast", ["half"], ["wide"], to=TensorProto.FLOAT))
    nth(model, "Transpose", 0).input[0] = "wide"
    return "goes into Cast, not into one Transpose"


def rectifier_leaks(model: ModelProto) -> str:
    nth(model, "Relu", 0).op_type = "LeakyRelu"
    return "goes into LeakyRelu, not into one BatchNormalization"


def norm_of_a_linear_layer_is_gone(model: ModelProto) -> str:
    leave_out(model, nth(model, "BatchNormalization", 0))
    return "goes into Relu, not into one BatchNormalization"


def leave_out(model: ModelProto, node: NodeProto) -> None:
    for user in model.graph.node:
        user.input[:] = [node.input[0] if name == node.output[0] else name for name in user.input]
    model.graph.node.remove(node)


def mean_is_measured(model: ModelProto) -> str:
    nth(model, "BatchNormalization", 0).input[3] = nth(model, "Transpose", 0).output[0]
    return "needs float32 constants of the shapes"


def weight_has_its_axes_swapped(model: ModelProto) -> str:
    return change_weight(model, "Conv", 2, lambda weight: weight.swapaxes(0, 1))


def linear_weight_has_its_axes_swapped(model: ModelProto) -> str:
    return change_weight(model, "MatMul", 1, lambda weight: weight.T)


def weight_is_half_precision(model: ModelProto) -> str:
    return change_weight(model, "Conv", 2, lambda weight: weight.astype(np.float16))


def weight_is_quantized(model: ModelProto) -> str:
    node = nth(model, "MatMul", 1)
    scale, zero = (
        numpy_helper.from_array(np.float32(0.1), "scale"),
        numpy_helper.from_array(np.int8(0), "zero"),
    )
    model.graph.initializer.extend([scale, zero])
    change_weight(model, "MatMul", 1, lambda weight: weight.astype(np.int8))
    model.graph.node.insert(
        0, helper.make_node("DequantizeLinear", [node.input[1], "scale", "zero"], ["wide"])
    )
    node.input[1] = "wide"
    return "needs float32 constants of the shapes"


def weight_lies_in_another_file(model: ModelProto) -> str:
    weight = model.graph.initializer[0]
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="elsewhere.bin")
    return "needs float32 constants of the shapes"


def weight_is_cut_off(model: ModelProto) -> str:
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]
    return "has more or fewer values than its shape"


def change_weight(
    model: ModelProto, operation: str, number: int, change: Callable[[np.ndarray], np.ndarray]
) -> str:
    name = nth(model, operation, number).input[1]
    (weight,) = [w for w in model.graph.initializer if w.name == name]
    changed = np.ascontiguousarray(change(numpy_helper.to_array(weight)))
    weight.CopyFrom(numpy_helper.from_array(changed, name))
    return "needs float32 constants of the shapes"


def bias_is_gone(model: ModelProto) -> str:
    del nth(model, "Conv", 3).input[2]
    return "needs float32 constants of the shapes"


def convolution_is_dilated(model: ModelProto) -> str:
    (dilations,) = [a for a in nth(model, "Conv", 1).attribute if a.name == "dilations"]
    dilations.ints[:] = [2, 2]
    return r"has dilations \[2, 2\], not \[1, 1\]"


def convolution_pads_by_itself(model: ModelProto) -> str:
    nth(model, "Conv", 2).attribute.append(helper.make_attribute("auto_pad", "SAME_UPPER"))
    return "has auto_pad b'SAME_UPPER'"


def axes_do_not_swap(model: ModelProto) -> str:
    nth(model, "Transpose", 1).attribute[0].ints[:] = [0, 1, 2, 3]
    return r"has perm \[0, 1, 2, 3\]"


def norm_is_of_training(model: ModelProto) -> str:
    nth(model, "BatchNormalization", 0).attribute.append(helper.make_attribute("training_mode", 1))
    return "has training_mode 1, not 0"


def norm_learns(model: ModelProto) -> str:
    nth(model, "BatchNormalization", 0).output.extend(["mean", "variance"])
    return "gives 3 tensors, not one"


def variance_is_negative(model: ModelProto) -> str:
    name = nth(model, "BatchNormalization", 0).input[4]
    (variance,) = [w for w in model.graph.initializer if w.name == name]
    variance.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(variance), name))
    return "a variance that is not positive"


def operation_is_of_another_domain(model: ModelProto) -> str:
    nth(model, "Relu", 2).domain = "com.microsoft"
    return "Relu is an operation of com.microsoft"


def operation_is_more_than_there_should_be(model: ModelProto) -> str:
    model.graph.node.append(helper.make_node("Relu", ["output"], ["rectified"]))
    model.graph.output[0].name = "rectified"
    return "its output is rectified, not output"


def operation_leads_nowhere(model: ModelProto) -> str:
    model.graph.node.append(helper.make_node("Sigmoid", [nth(model, "Add", 1).output[0]], ["nowhere"]))
    return "1 more nodes than that, first the operator Sigmoid"


def output_is_of_an_inner_node(model: ModelProto) -> str:
    model.graph.output[0].name = nth(model, "Transpose", 1).output[0]
    return "its output is"


def outputs_are_two(model: ModelProto) -> str:
    model.graph.output.add().name = nth(model, "Mul", 1).output[0]
    return "1 inputs and 2 outputs"


def names_are_not_unique(model: ModelProto) -> str:
    model.graph.initializer.add().CopyFrom(model.graph.initializer[0])
    return "two of its tensors have the same name"


def opset_is_old(model: ModelProto) -> str:
    model.opset_import[0].version = 8
    return "opset 8"


def frames_are_of_any_number(model: ModelProto) -> str:
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "frames"
    return r"the shape \(1, 4, 128, frames\), not \(batch, 4, bins, frames\)"


def frames_do_not_halve(model: ModelProto) -> str:
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 30
    return "128 bins, 30 frames"


def input_is_mono(model: ModelProto) -> str:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 2
    return r"the shape \(1, 2, 128, 32\)"


def input_is_half_precision(model: ModelProto) -> str:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    return "its input is not float32"


def graph_is_empty(model: ModelProto) -> str:
    del model.graph.node[:]
    return "it has 0 Conv and 0 ConvTranspose nodes"


CHANGES = [
    skip_is_added, skip_is_multiplied_by_itself, skip_is_taken_before_the_frequency_layers,
    frequency_layers_are_added_to_the_blocks_input, frequency_layers_are_multiplied, rectifier_is_gone,
    precision_is_halved_in_between, rectifier_leaks, norm_of_a_linear_layer_is_gone, mean_is_measured, weight_has_its_axes_swapped,
    linear_weight_has_its_axes_swapped, weight_is_half_precision, weight_is_quantized, weight_lies_in_another_file,
    weight_is_cut_off, bias_is_gone, convolution_is_dilated, convolution_pads_by_itself, axes_do_not_swap,
    norm_is_of_training, norm_learns, variance_is_negative, operation_is_of_another_domain,
    operation_is_more_than_there_should_be, operation_leads_nowhere, output_is_of_an_inner_node, outputs_are_two,
    names_are_not_unique, opset_is_old, frames_are_of_any_number, frames_do_not_halve, input_is_mono,
    input_is_half_precision, graph_is_empty,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_graph_that_is_something_else_is_refused(
    change: Callable[[ModelProto], str], model: ModelProto
) -> None:
    onnx_unet.unet(model)
    message = change(model)
    with pytest.raises(WeightsError, match=message) as refusal:
        onnx_unet.unet(model)
    assert str(refusal.value).startswith("the ONNX graph is not a TFC-TDF U-Net")
    assert "\n" not in str(refusal.value)


def test_group_norms_are_refused(tmp_path: Path) -> None:
    tiny.export(tiny.unet("bass", 4, seed=1), tmp_path / "bass.onnx")
    with pytest.raises(WeightsError, match="not into one BatchNormalization"):
        onnx_unet.unet(tmp_path / "bass.onnx")


@pytest.mark.parametrize("content", [None, b"no graph at all", b""])
def test_a_file_without_a_graph_is_refused(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "vocals.onnx").write_bytes(content)
    with pytest.raises(WeightsError, match="damaged or missing|opset unknown"):
        onnx_unet.unet(tmp_path / "vocals.onnx")
