"""The image tokenizer: shapes, quantization, training, and recovery from codebook collapse."""

import numpy as np
import pytest
import torch
from tests_support import TensorSizes

from cm3leon.config.schema import ImageTokenizerConfig
from cm3leon.models import vqgan
from cm3leon.models.pixels import to_channels_first
from cm3leon.models.vqgan import Codebook, ImageTokenizer, reconstruct
from cm3leon.training.vqgan import RESTART_EVERY, ImageTokenizerTrainer, code_statistics, make_spec, psnr, train_image_tokenizer

CPU = torch.device("cpu")
SMALL = {"image_size": 32, "channels": 16, "embedding_dim": 8, "codebook_size": 32, "blocks": 1, "warmup_steps": 5}


def flat_images(count, side=32, seed=0):
    """Images of four flat quarters in random saturated colors."""
    rng = np.random.default_rng(seed)
    quarters = rng.integers(0, 2, size=(count, 2, 2, 3)) * 255
    return quarters.repeat(side // 2, axis=1).repeat(side // 2, axis=2).astype(np.uint8)


@pytest.mark.parametrize(("patch", "multipliers", "factor"), [(4, [1, 2], 8), (1, [1, 1, 2, 2], 8), (8, [1], 8), (2, [1, 2], 4)])
def test_shapes_and_downsampling(patch, multipliers, factor):
    config = ImageTokenizerConfig(**{**SMALL, "patch": patch, "multipliers": multipliers})
    model = ImageTokenizer(make_spec(config)).eval()
    codes = model.encode(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert config.downsampling == factor
    assert codes.shape == (2, (32 // factor) ** 2) and codes.dtype == torch.int64
    images = model.decode(codes)
    assert images.shape == (2, 3, 32, 32) and images.abs().max() <= 1


def test_nearest_entries_are_searched_a_part_of_the_latents_at_a_time(monkeypatch):
    torch.manual_seed(0)
    codebook, z = Codebook(24, 5), torch.randn(1000, 5)
    expected = codebook.nearest(z)
    monkeypatch.setattr(vqgan, "MAX_DISTANCES", 24 * 7)
    with TensorSizes() as seen:
        assert torch.equal(codebook.nearest(z), expected)
    assert max(seen.sizes) <= z.numel() < 24 * 1000


def test_the_codebook_starts_from_a_sample_of_many_latents(monkeypatch):
    monkeypatch.setattr(vqgan, "LATENTS_PER_ENTRY", 10)
    codebook, z = Codebook(4, 2), torch.randn(10_000, 2)
    read: list[int] = []
    nearest = Codebook.nearest

    def counted(self, z_ND):
        read.append(len(z_ND))
        return nearest(self, z_ND)

    monkeypatch.setattr(Codebook, "nearest", counted)
    codebook.initialize(z, torch.Generator().manual_seed(0))
    assert set(read) == {40}


def test_nearest_entries_are_searched_in_float32_also_under_autocast():
    torch.manual_seed(0)
    model = ImageTokenizer(make_spec(ImageTokenizerConfig(**{**SMALL, "codebook_size": 256}))).eval()
    images = torch.rand(32, 3, 32, 32) * 2 - 1
    latents = model.encoder(images).detach().permute(0, 2, 3, 1).reshape(-1, 8)
    model.codebook.entries.copy_(latents[::2])
    expected = model.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encode(images), expected)


def test_codes_are_the_nearest_entries():
    codebook = Codebook(16, 4)
    z = torch.randn(50, 4)
    distances = torch.cdist(z.double(), codebook.entries.double())
    assert torch.equal(codebook.nearest(z), distances.argmin(-1))


def test_latents_of_a_flat_image_are_flat_at_initialization():
    model = ImageTokenizer(make_spec(ImageTokenizerConfig(**{**SMALL, "channels": 64, "embedding_dim": 192})))
    latents = model.encoder(torch.randn(1, 3, 1, 1).expand(1, 3, 32, 32))
    assert latents.std(dim=(2, 3)).max() < 1e-5 and latents.norm() > 0.1


def test_wrong_image_size_is_an_error():
    model = ImageTokenizer(make_spec(ImageTokenizerConfig(**SMALL)))
    with pytest.raises(ValueError, match=r"\(B, 3, 32, 32\)"):
        model.encode(torch.zeros(1, 3, 64, 64))


def test_moving_averages_bring_entries_to_the_mean_of_their_latents():
    codebook = Codebook(2, 3)
    codebook.entries.copy_(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]))
    codebook.sums.copy_(codebook.entries)
    z = torch.tensor([[0.8, 0.0, 0.6], [0.6, 0.0, 0.8]]).repeat(5, 1)
    for _ in range(200):
        codebook.update(*codebook.statistics(z, codebook.nearest(z)), decay=0.9)
    torch.testing.assert_close(codebook.entries[0], torch.tensor([0.7, 0.0, 0.7]))
    torch.testing.assert_close(codebook.entries[1], torch.tensor([0.0, 1.0, 0.0]))


def test_a_collapsed_codebook_recovers_by_restarts():
    codebook = Codebook(32, 8)
    z = torch.randn(4000, 8)
    codebook.entries.copy_(5 + 0.001 * torch.randn(32, 8))
    codebook.entries[0] = 0
    codebook.sums.copy_(codebook.entries)
    before = code_statistics(codebook.nearest(z), 32)["codebook_perplexity"]
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        codebook.update(*codebook.statistics(z, codebook.nearest(z)), decay=0.5)
        codebook.restart(z, 0.05, generator)
    after = code_statistics(codebook.nearest(z), 32)["codebook_perplexity"]
    assert before < 2 and after > 24


def test_an_entry_that_a_patch_needs_every_50_steps_is_not_restarted():
    config, generator = ImageTokenizerConfig(), torch.Generator().manual_seed(0)
    codebook = Codebook(192, 8)
    common, rare = codebook.entries[:32].clone(), codebook.entries[100].clone()
    for step in range(500):
        z = common.repeat(2, 1)
        if step % 50 == 0:
            z[0] = rare
        codebook.update(*codebook.statistics(z, codebook.nearest(z)), decay=config.codebook_decay)
        if step % RESTART_EVERY == RESTART_EVERY - 1:
            codebook.restart(z, config.restart_below, generator)
    torch.testing.assert_close(codebook.entries[100], rare)


def test_images_unlike_all_of_training_get_codes_that_training_images_have(tmp_path):
    images = flat_images(16)
    trained = train_image_tokenizer(images, ImageTokenizerConfig(**{**SMALL, "codebook_size": 200}, steps=20, batch_size=8), 0)
    trained.save(tmp_path)
    model = ImageTokenizer.load(tmp_path)
    noise = np.random.default_rng(0).integers(0, 60, images.shape)
    noisy = torch.from_numpy((images * 0.7 + noise).astype(np.uint8))
    known = set(reconstruct(model, torch.from_numpy(images))[0].flatten().tolist())
    assert set(reconstruct(model, noisy)[0].flatten().tolist()) <= known and int(model.codebook.used.sum()) == len(known)
    model.codebook.used.fill_(True)
    assert set(reconstruct(model, torch.from_numpy(images))[0].flatten().tolist()) == known
    assert not set(reconstruct(model, noisy)[0].flatten().tolist()) <= known


def test_kmeans_initialization_finds_well_separated_clusters():
    centers = torch.randn(8, 4) * 10
    z = centers.repeat(200, 1) + 0.01 * torch.randn(1600, 4)
    codebook = Codebook(8, 4)
    codebook.initialize(z, torch.Generator().manual_seed(0))
    assert torch.cdist(centers, codebook.entries).amin(1).max() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 4e-3), ("muon", 2e-2)])
def test_training_reconstructs_and_is_deterministic(optimizer, rate):
    images = flat_images(64)
    config = ImageTokenizerConfig(**SMALL, steps=60, batch_size=16, optimizer=optimizer, learning_rate=rate)
    first, second = (train_image_tokenizer(images, config, 0) for _ in range(2))
    codes, reconstructions = reconstruct(first, torch.from_numpy(images))
    gray = torch.full_like(reconstructions, 128)
    assert psnr(torch.from_numpy(images), reconstructions) > psnr(torch.from_numpy(images), gray) + 5
    assert torch.equal(codes, reconstruct(second, torch.from_numpy(images))[0])


@pytest.mark.parametrize(("kernel", "local"), [(1, True), (3, False)])
def test_with_kernel_1_a_code_depends_on_its_own_patch_only(kernel, local):
    model = ImageTokenizer(make_spec(ImageTokenizerConfig(**SMALL, encoder_kernel=kernel))).eval()
    for parameter in model.encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    other = image.clone()
    other[..., :8, :8] = -other[..., :8, :8]
    with torch.no_grad():
        changed = (model.encoder(image) != model.encoder(other)).any(1)[0]
    assert changed[0, 0]
    assert (changed.sum() == 1) == local


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_of_the_tokenizer_is_in_an_optimizer_once(optimizer):
    trainer = ImageTokenizerTrainer(ImageTokenizerConfig(**SMALL, optimizer=optimizer), flat_images(8), 0)
    grouped = [p for each in trainer.optimizers for group in each.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, trainer.model.parameters()))


def test_adversarial_training_updates_the_discriminator_from_its_start():
    config = ImageTokenizerConfig(**SMALL, steps=10, adversarial_weight=0.5, adversarial_start=2)
    trainer = ImageTokenizerTrainer(config, flat_images(8), 0)
    before = [p.detach().clone() for p in trainer.discriminator.parameters()]
    metrics = [trainer.step(step, batch) for step, batch in zip(range(4), trainer.batches(0), strict=False)]
    assert "discriminator_loss" not in metrics[1] and metrics[2]["discriminator_loss"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.discriminator.parameters(), strict=True))


@pytest.mark.slow
def test_the_perceptual_loss_reads_vgg_weights_and_sees_differences(tmp_path):
    from cm3leon.utils.torchvision_compat import make_importable

    make_importable()
    from safetensors.torch import save_file
    from torchvision.models import vgg16

    from cm3leon.training.vqgan_losses import PerceptualLoss

    state = {f"features.{k}": v for k, v in vgg16(weights=None).features.state_dict().items()}
    save_file(state, tmp_path / "vgg.safetensors")
    loss = PerceptualLoss(tmp_path / "vgg.safetensors")
    image = to_channels_first(torch.from_numpy(flat_images(1)), CPU)
    assert loss(image, image) == 0 and loss(image, -image) > 0


def test_save_and_load(tmp_path):
    model = ImageTokenizer(make_spec(ImageTokenizerConfig(**SMALL))).eval()
    model.save(tmp_path)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(ImageTokenizer.load(tmp_path).encode(images), model.encode(images))


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="not a multiple"):
        ImageTokenizerConfig(image_size=60)
    with pytest.raises(ValueError, match="needs perceptual_weights"):
        ImageTokenizerConfig(perceptual_weight=1.0)
