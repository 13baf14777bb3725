"""The interface of each network: shapes, narrowing, strict loading, ONNX."""

from __future__ import annotations

import pytest
import tiny
import torch
from conftest import decibels

from kmdx.errors import KmdxWarning
from kmdx.networks import tfc_tdf
from kmdx.networks.demucs import DemucsNetwork, build
from kmdx.networks.onnx import OnnxNetwork
from kmdx.networks.spectrogram import SpectrogramConfig
from kmdx.networks.tfc_tdf import TfcTdf, TfcTdfConfig

CPU = torch.device("cpu")


@pytest.fixture
def batch() -> torch.Tensor:
    torch.manual_seed(7)
    return 0.1 * torch.randn(3, 2, tiny.CHUNK)


def test_the_inverse_spectrogram_returns_the_signal_if_no_bin_is_left_out() -> None:
    config = SpectrogramConfig(n_fft=512, hop=128, bins=257, frames=9)
    spectrogram = config.build()
    wave = torch.randn(2, 2, config.chunk)
    channels = spectrogram(wave)
    assert channels.shape == (2, 4, 257, 9)
    assert decibels(wave, spectrogram.inverse(channels)) > 110


def test_spectrogram_channels_are_left_then_right_real_then_imaginary() -> None:
    config = SpectrogramConfig(n_fft=512, hop=128, bins=100, frames=9)
    wave = torch.randn(1, 2, config.chunk)
    channels = config.build()(wave)[0]
    window = torch.hann_window(512, periodic=True)
    for index, channel in enumerate(wave[0]):
        expected = torch.stft(channel, 512, 128, window=window, return_complex=True)[:100]
        assert torch.equal(channels[2 * index], expected.real)
        assert torch.equal(channels[2 * index + 1], expected.imag)


@pytest.mark.parametrize("norm_groups", [None, 1, 2, 4])
def test_unet_takes_any_norm_and_a_batch_equals_its_parts(
    norm_groups: int | None, batch: torch.Tensor
) -> None:
    network = tiny.unet("bass", norm_groups, seed=1)
    with torch.inference_mode():
        together = network(batch)
        alone = torch.cat([network(one[None]) for one in batch])
    assert together.shape == (3, 1, 2, tiny.CHUNK)
    assert decibels(alone, together) > 100


@pytest.mark.parametrize("norm_groups", [None, 2])
def test_unet_with_gradients_gives_the_same_and_does_not_change_its_input(
    norm_groups: int | None, batch: torch.Tensor
) -> None:
    network = tiny.unet("bass", norm_groups, seed=1)
    before = batch.clone()
    estimate = network(batch)
    estimate.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    assert any(parameter.grad.any() for parameter in network.encoding_blocks[0].tdf.parameters())
    with torch.inference_mode():
        assert decibels(estimate.detach(), network(batch)) > 110
    assert torch.equal(batch, before)


@pytest.mark.parametrize(("norm_groups", "expected"), [(None, True), (2, False)])
def test_convolutions_run_in_channels_last_where_no_group_norm_changes_it_back(
    norm_groups: int | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny.unet("bass", norm_groups, 3)
    batch = torch.randn(2, 2, network.length, generator=torch.Generator().manual_seed(0))
    block, found = network.encoding_blocks[0], []
    block.tfc.H[0][0].register_forward_pre_hook(
        lambda _, inputs: found.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    block.tdf.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].is_contiguous()))
    with torch.inference_mode():
        exact = network(batch)
        monkeypatch.setattr(tfc_tdf, "channels_last_is_faster", lambda x: True)
        torch.testing.assert_close(network(batch), exact)
    assert found == [False, True, expected, True], "layers along frequency need it as the last axis"


def test_unet_loads_the_authors_layout_and_refuses_anything_else() -> None:
    source, target = tiny.unet("drums", 2, seed=1), tiny.unet("drums", 2, seed=2)
    state = tiny.author_state(source)
    target.load(state)
    assert all(torch.equal(target.state_dict()[name], value) for name, value in source.state_dict().items())

    with pytest.raises(ValueError, match=r"1 missing \(final_conv.0.bias\)"):
        target.load({name: value for name, value in state.items() if name != "final_conv.0.bias"})
    with pytest.raises(ValueError, match=r"1 unknown \(extra\)"):
        target.load({**state, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"of the wrong shape \(first_conv.0.weight\)"):
        target.load({**state, "first_conv.0.weight": torch.zeros(3, 4, 1, 1)})
    with pytest.raises(ValueError, match="not the periodic Hann window"):
        target.load({**state, "window": torch.hamming_window(1024)})
    with pytest.raises(ValueError, match="freq_pad is not zeros"):
        target.load({**state, "freq_pad": torch.ones(1, 4, *source.padding_shape)})


def test_unet_with_other_norms_refuses_the_weights() -> None:
    batch_norm, group_norm = tiny.unet("vocals", None, seed=1), tiny.unet("vocals", 2, seed=2)
    with pytest.raises(ValueError, match="unknown"):
        group_norm.load(tiny.author_state(batch_norm))
    with pytest.raises(ValueError, match="missing"):
        batch_norm.load(tiny.author_state(group_norm))


@pytest.mark.parametrize(("change", "message"), [({"layers": 4}, "odd"), ({"layers": 15}, "divisible")])
def test_unet_config_refuses_sizes_that_do_not_fit(change: dict, message: str) -> None:
    sizes = {"layers": 5, "convolutions": 1, "growth": 4, "norm_groups": 2, **change}
    with pytest.raises(ValueError, match=message):
        TfcTdfConfig(SpectrogramConfig(**tiny.TRANSFORM), **sizes)


@pytest.mark.parametrize("dynamic", [True, False])
def test_onnx_equals_the_network_it_was_exported_from(dynamic: bool, batch: torch.Tensor, tmp_path) -> None:
    network = tiny.unet("vocals", None, seed=3)
    tiny.export(network, tmp_path / "vocals.onnx", dynamic)
    exported = OnnxNetwork(tmp_path / "vocals.onnx", network.config.spectrogram, "vocals", CPU)
    assert exported.providers == ("CPUExecutionProvider",)
    assert exported.batch_size == (None if dynamic else 1)
    with torch.inference_mode():
        assert decibels(network(batch), exported(batch)) > 100


def test_onnx_on_the_cpu_of_a_cuda_machine_gives_a_warning(tmp_path) -> None:
    network = tiny.unet("vocals", None, seed=3)
    tiny.export(network, tmp_path / "vocals.onnx")
    with pytest.warns(KmdxWarning, match="runs on the CPU instead of cuda:0"):
        exported = OnnxNetwork(
            tmp_path / "vocals.onnx", network.config.spectrogram, "vocals", torch.device("cuda:0")
        )
    assert exported.providers == ("CPUExecutionProvider",)


@pytest.mark.parametrize("architecture", [tiny.HTDEMUCS, tiny.HDEMUCS, tiny.HYBRID_OLD])
@pytest.mark.parametrize("sources", [["vocals"], ["bass", "drums"], tiny.SOURCES])
def test_a_narrowed_demucs_gives_the_same_estimates(architecture: dict, sources: list[str]) -> None:
    network = DemucsNetwork(tiny.demucs(architecture, seed=5))
    wave = 0.1 * torch.randn(1, 2, network.length or 30000)
    with torch.inference_mode():
        everything = network(wave)
        narrow = network.narrow(sources)
        assert narrow.sources == tuple(sources)
        expected = everything[:, [tiny.SOURCES.index(source) for source in sources]]
        assert decibels(expected, narrow(wave)) > 110
        assert torch.equal(network(wave), everything), "narrowing changed the network it came from"


def test_a_narrowed_demucs_shares_its_weights() -> None:
    network = DemucsNetwork(tiny.demucs(tiny.HTDEMUCS, seed=5))
    own = {parameter.data_ptr() for parameter in network.parameters()}
    narrow = network.narrow(["bass"])
    new = [parameter for parameter in narrow.parameters() if parameter.data_ptr() not in own]
    assert len(new) == 4, "the last layers' weights and biases, and nothing more"


def test_demucs_refuses_an_unknown_source() -> None:
    with pytest.raises(ValueError, match="not guitar"):
        DemucsNetwork(tiny.demucs(tiny.HTDEMUCS, seed=5)).narrow(["guitar"])


def test_demucs_is_built_without_changing_a_weight_and_runs_at_the_plans_segment() -> None:
    original = tiny.demucs(tiny.HTDEMUCS, seed=5)
    options = {key: value for key, value in tiny.HTDEMUCS.items() if key != "type"}
    halves = {name: tensor.half() for name, tensor in original.state_dict().items()}
    network = build({"type": "htdemucs", **options}, 0.25, halves)
    assert network.length == 11025
    assert not network.training
    for name, tensor in network.model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, halves[name].float())


def test_demucs_refuses_another_networks_weights() -> None:
    options = {key: value for key, value in tiny.HTDEMUCS.items() if key != "type"}
    with pytest.raises(ValueError, match="another network's weights"):
        build({"type": "htdemucs", **options}, None, tiny.demucs(tiny.HDEMUCS, seed=5).state_dict())


def test_a_network_with_one_source_refuses_others() -> None:
    network: TfcTdf = tiny.unet("bass", 2, seed=1)
    assert network.narrow(["bass"]) is network
    with pytest.raises(ValueError, match="estimates bass, not vocals"):
        network.narrow(["vocals"])
