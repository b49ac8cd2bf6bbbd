"""A small SDXL that has learned to generate photos of coloured shapes, and pairs to align it with.

The pipeline has every part of SDXL at 32 px. It was trained on drawings of `small_world.py`: it generates "a red
circle" and "a photo of a red circle" as photos, half of them in a dark frame, and "a cartoon of a red circle" as a
cartoon. Its weights are in `trained_world.safetensors` (float16), which `--train` makes in an hour on two CPU cores.
`measure` recognizes the content of an image by fixed rules on its pixels.

    python tests/trained_world.py FOLDER            # writes FOLDER/pipeline, and FOLDER/captions.txt to make pairs
    python tests/trained_world.py --train FOLDER    # trains the weights again, and writes them to FOLDER
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file, save_file
from small_world import (
    COLOURS,
    SHAPES,
    STYLES,
    build_scheduler,
    build_tokenizer,
    caption,
    draw,
    pair,
    text_config,
    write_pairs,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection


SIZE = 32
WEIGHTS = Path(__file__).with_suffix(".safetensors")
SUBJECTS = [(shape, colour) for shape in SHAPES for colour in COLOURS]
# Subjects that no pair contains (except for those of "size"), with every shape and every colour. They are measured.
HELD_OUT = [
    ("circle", "red"),
    ("square", "blue"),
    ("triangle", "green"),
    ("star", "yellow"),
    ("circle", "purple"),
    ("star", "orange"),
]
PREFERRED = [subject for subject in SUBJECTS if subject not in HELD_OUT]


def build_pipeline() -> StableDiffusionXLPipeline:
    """The pipeline with random weights."""
    words = (*STYLES, "of")
    tokenizer = build_tokenizer("<|endoftext|>", words)
    tokenizer_2 = build_tokenizer("!", words)
    config = text_config(len(tokenizer), 32, "quick_gelu")
    config_2 = text_config(len(tokenizer_2), 32, "gelu")
    unet = UNet2DConditionModel(
        sample_size=SIZE // 2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(1, 2),
        norm_num_groups=8,
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        force_upcast=False,
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(config),
        text_encoder_2=CLIPTextModelWithProjection(config_2),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=build_scheduler("epsilon"),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


MODELS = ("vae", "text_encoder", "text_encoder_2", "unet")


def load_pipeline(weights: Path = WEIGHTS) -> StableDiffusionXLPipeline:
    """The trained pipeline, in float32."""
    pipeline = build_pipeline()
    state = load_file(weights)
    for name in MODELS:
        prefix = f"{name}."
        part = {key.removeprefix(prefix): value.float() for key, value in state.items() if key.startswith(prefix)}
        getattr(pipeline, name).load_state_dict(part)
    pipeline.vae.register_to_config(scaling_factor=state["scaling_factor"].item())
    return pipeline


def save_weights(pipeline: StableDiffusionXLPipeline, weights: Path) -> None:
    state = {"scaling_factor": torch.tensor(pipeline.vae.config.scaling_factor)}
    for name in MODELS:
        for key, value in getattr(pipeline, name).state_dict().items():
            state[f"{name}.{key}"] = value.half()
    save_file(state, weights)


def pixels(images: list[Image.Image]) -> torch.Tensor:
    """Images as `(images, 3, height, width)` in [-1, 1]."""
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(vae: AutoencoderKL, images: torch.Tensor, steps: int) -> None:
    """Train the VAE to reconstruct images, and set its scaling factor from the latents' standard deviation."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        batch = images[torch.randint(len(images), (32,))]
        posterior = vae.encode(batch).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        loss = (reconstruction - batch).abs().mean() + 1e-5 * posterior.kl().mean() / 1024
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"VAE step {step}: loss {loss.item():.4f}", flush=True)
    with torch.no_grad():
        latents = vae.encode(images[:512]).latent_dist.sample()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))


def encode_captions(pipeline: StableDiffusionXLPipeline, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings of captions, and those that are pooled."""
    prompt_embeds, _, pooled_embeds, _ = pipeline.encode_prompt(
        captions, device="cpu", do_classifier_free_guidance=False
    )
    return prompt_embeds, pooled_embeds


def train_denoiser(
    pipeline: StableDiffusionXLPipeline, images: torch.Tensor, captions: list[tuple[str, ...]], steps: int
) -> None:
    """
    Train UNet and text encoders to denoise images, each with one of its captions.

    A tenth of the captions is dropped, for classifier-free guidance.
    """
    with torch.no_grad():
        latents = torch.cat([pipeline.vae.encode(batch).latent_dist.sample() for batch in images.split(256)])
    latents *= pipeline.vae.config.scaling_factor

    models = [pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2]
    parameters = [parameter for model in models for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.03)
    average = EMAModel(parameters, decay=0.999)
    alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
    time_ids = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]], dtype=torch.float32)
    for step in range(steps):
        # Noisy latents.
        chosen = torch.randint(len(latents), (64,))
        noise = torch.randn(64, *latents.shape[1:])
        timesteps = torch.randint(1000, (64,))
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents[chosen] + (1 - alpha).sqrt() * noise

        # Embeddings of their captions, each of which is encoded once.
        prompts = [captions[i][turn % len(captions[i])] for turn, i in enumerate(chosen.tolist())]
        different = sorted(set(prompts))
        places = [different.index(prompt) for prompt in prompts]
        prompt_embeds, pooled_embeds = encode_captions(pipeline, different)
        kept = torch.rand(64) > 0.1
        prompt_embeds = prompt_embeds[places] * kept.view(-1, 1, 1)
        pooled_embeds = pooled_embeds[places] * kept.view(-1, 1)
        conditions = {"text_embeds": pooled_embeds, "time_ids": time_ids.expand(64, -1)}

        prediction = pipeline.unet(noisy, timesteps, prompt_embeds, added_cond_kwargs=conditions).sample
        loss = (prediction - noise).pow(2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.step(parameters)
        if step % 100 == 0:
            print(f"UNet step {step}: loss {loss.item():.4f}", flush=True)
    average.copy_to(parameters)


def train(folder: Path) -> None:
    """Train the full pipeline on drawings."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    photos = pixels([draw(*subject, "photo", rng, SIZE, framed=rng.random() < 0.5) for subject in 300 * SUBJECTS])
    cartoons = pixels([draw(*subject, "cartoon", rng, SIZE) for subject in 150 * SUBJECTS])
    captions = 300 * [(caption(*subject), f"a photo of {caption(*subject)}") for subject in SUBJECTS]
    captions += 150 * [(f"a cartoon of {caption(*subject)}",) for subject in SUBJECTS]
    pipeline = build_pipeline()
    train_vae(pipeline.vae, torch.cat([photos[:2400], cartoons[:2400]]), 1500)
    train_denoiser(pipeline, torch.cat([photos, cartoons]), captions, 5000)
    save_weights(pipeline, folder / WEIGHTS.name)


# Content of an image, by fixed rules on its pixels ------------------------------------------------------------------
# The symmetry of each shape under rotations by 1/3, 1/4 and 1/5 of a turn.
SYMMETRIES = {"circle": (0, 0, 0), "square": (0, 0.4, 0), "triangle": (0.7, 0, 0), "star": (0, 0, 0.75)}


def object_mask(array: np.ndarray) -> np.ndarray:
    """How much each pixel belongs to the object, in [0, 1]. Shading keeps saturation; grey and black have none."""
    saturation = (array.max(axis=2) - array.min(axis=2)) / (array.max(axis=2) + 0.15)
    return (saturation / np.quantile(saturation, 0.97) / 0.3 - 0.67).clip(0, 1)


def symmetries(mask: np.ndarray) -> np.ndarray:
    """Absolute angular moments of order 3, 4 and 5 about the mask's centre. Pixels far from it have more weight."""
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]]
    points = x + 1j * y
    # Ignore specks far from the object.
    radius = np.sqrt(mask.sum() / np.pi)
    centre = (mask * points).sum() / mask.sum()
    mask = mask * (abs(points - centre) < 2.2 * radius)

    points = points - (mask * points).sum() / mask.sum()
    directions = np.exp(1j * np.angle(points))
    weights = mask * abs(points) ** 4
    return np.array([abs((weights * directions**order).sum()) / weights.sum() for order in (3, 4, 5)])


def radius(image: Image.Image) -> float:
    """Radius of the circle with the object's area, relative to the image's side."""
    return float(np.sqrt(object_mask(np.asarray(image) / 255).sum() / np.pi) / SIZE)


def hue(rgb: np.ndarray) -> complex:
    """Sum of colours `(..., 3)` in the plane of hues: its direction is the hue, its length the chroma."""
    turns = np.exp(2j * np.pi * np.arange(3) / 3)
    return (rgb @ turns).sum()


def ring(grey: np.ndarray, i: int) -> np.ndarray:
    """The pixels at distance i from the edge."""
    return np.concatenate([grey[i, i:-i], grey[-i - 1, i:-i], grey[i:-i, i], grey[i:-i, -i - 1]])


def measure(image: Image.Image) -> dict:
    """The content of an image of SIZE: `shape`, `colour`, `cartoon` and `framed`.

    The shape is that of the nearest symmetries, the colour that of the nearest hue. A cartoon has a white background
    and a dark outline; a frame is an outer ring that is far darker than the ring inside.
    """
    array = np.asarray(image) / 255
    grey = array.mean(axis=2)
    mask = object_mask(array)
    found_symmetries = symmetries(mask)
    found_hue = hue(array[mask > 0.5])
    angles = {}
    for name, rgb in COLOURS.items():
        angles[name] = abs(np.angle(found_hue / hue(np.array(rgb, dtype=float))))

    inner = slice(2, -2)  # without a frame
    background = grey[inner, inner][mask[inner, inner] < 0.5]
    dark = array[inner, inner].max(axis=2) < 0.5
    return {
        "shape": min(SHAPES, key=lambda shape: abs(found_symmetries - SYMMETRIES[shape]).sum()),
        "colour": min(angles, key=angles.get),
        "cartoon": bool(np.median(background) > 0.85 and dark.mean() > 0.01),
        "framed": bool(ring(grey, 1).mean() < 0.6 * ring(grey, 4).mean()),
    }


def sample(
    pipeline: StableDiffusionXLPipeline, images: int, guidance_scale: float = 1.5, prefix: str = ""
) -> list[tuple]:
    """Generate images of the held-out captions in turn, each with its own seed: [((shape, colour), image)]."""
    pipeline.set_progress_bar_config(disable=True)
    subjects = [HELD_OUT[i % len(HELD_OUT)] for i in range(images)]
    generated = []
    for start in range(0, images, 48):
        prompts = [prefix + caption(*subject) for subject in subjects[start : start + 48]]
        generators = [torch.Generator().manual_seed(10_000 + start + i) for i in range(len(prompts))]
        generated += pipeline(
            prompts, num_inference_steps=20, guidance_scale=guidance_scale, generator=generators
        ).images
    return list(zip(subjects, generated, strict=True))


def shares(samples: list[tuple]) -> dict[str, float]:
    """Share of cartoons, of frames, and of images with the right shape and colour."""
    counts = {"cartoon": 0, "framed": 0, "right": 0}
    for subject, image in samples:
        content = measure(image)
        counts["cartoon"] += content["cartoon"]
        counts["framed"] += content["framed"]
        counts["right"] += (content["shape"], content["colour"]) == subject
    return {name: count / len(samples) for name, count in counts.items()}


# Preferences --------------------------------------------------------------------------------------------------------
# Style of the chosen and of the rejected images, and the share of them that has a frame. Both images of "size" are
# alike, but with different positions and sizes of the shape; the larger one is chosen.
TASKS = {
    "size": (("photo", 0.5), ("photo", 0.5)),
    "frame": (("photo", 0.0), ("photo", 1.0)),
    "cartoon": (("cartoon", 0.0), ("photo", 0.5)),
}


def draw_preferences(folder: str | Path, task: str, num_pairs: int = 360, seed: int = 1) -> None:
    """Write the pairs of a task. No caption names a style or a frame."""
    rng = np.random.default_rng(seed)
    subjects = SUBJECTS if task == "size" else PREFERRED
    rows = []
    for i in range(num_pairs):
        shape, colour = subjects[i % len(subjects)]
        images = []
        for number, (style, share_of_frames) in enumerate(TASKS[task]):
            # Generators with the same seed draw the shape at the same position.
            position = [seed, i, 1] if task == "size" and number == 1 else [seed, i]
            framed = rng.random() < share_of_frames
            images.append(draw(shape, colour, style, np.random.default_rng(position), SIZE, framed=framed))
        if task == "size":
            images.sort(key=radius, reverse=True)
        chosen, rejected = images
        rows.append(pair(chosen, rejected, caption(shape, colour), first=rng.random() < 0.5))
    write_pairs(rows, folder, num_shards=2, row_group_size=30)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a small trained SDXL, and captions to make pairs.")
    parser.add_argument("folder", type=Path, help="where to write pipeline/ and captions.txt")
    parser.add_argument("--train", action="store_true", help="train the weights again instead, into the folder")
    args = parser.parse_args()
    if args.train:
        args.folder.mkdir(parents=True, exist_ok=True)
        train(args.folder)
        return
    load_pipeline().save_pretrained(args.folder / "pipeline")
    captions = [caption(*subject) for subject in PREFERRED]
    (args.folder / "captions.txt").write_text("\n".join(10 * captions) + "\n")
    print(args.folder / "pipeline")
    print(args.folder / "captions.txt")


if __name__ == "__main__":
    main()
