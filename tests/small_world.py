"""A small world for tests: a tiny SDXL pipeline and a preference data set, made locally and always the same.

`build_pipeline` writes a randomly initialised but complete SDXL pipeline in the folder layout of
`stabilityai/stable-diffusion-xl-base-1.0`; `draw_pairs` writes a Pick-Style data set as parquet, in which a flat
cartoon is preferred to a shaded photo of the same shape. Neither needs the network.

    python tests/small_world.py FOLDER    # writes FOLDER/pipeline and FOLDER/pairs
"""

import argparse
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw, ImageFilter
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 90, 220),
    "yellow": (245, 210, 50),
    "purple": (140, 60, 180),
    "orange": (245, 140, 30),
}
SHAPES = ("circle", "square", "triangle", "star")
STYLES = ("cartoon", "photo")

SUPERSAMPLING = 4


def build_tokenizer(pad_token: str, words: tuple[str, ...] = ()) -> CLIPTokenizer:
    """Make a CLIP tokenizer for which every word of the captions, and of `words`, is one token."""
    # CLIP's own order of bytes: the printable ones first, so that "!" is token 0, then the others moved past 255.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = [chr(code) for code in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    # Every merge takes in the end of the word, so at most one applies at a time and words cannot spoil each other.
    merges = {}
    for word in ("an", *COLOURS, *SHAPES, *words):
        for i in range(len(word) - 1, 0, -1):
            merges[word[i - 1], word[i:] + "</w>"] = word[i - 1 :] + "</w>"
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *merges.values(), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=list(merges), pad_token=pad_token, model_max_length=77)


def text_config(vocab_size: int, hidden_size: int, hidden_act: str) -> CLIPTextConfig:
    # The special token ids are those in SDXL's own configs: wrong, and 2 makes CLIP pool at the highest token id.
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        projection_dim=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act=hidden_act,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )


def build_unet(cross_attention_dim: int, pooled_dim: int) -> UNet2DConditionModel:
    addition_time_embed_dim = 8
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 32),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(1, 2),  # SDXL's config also has the number of heads under this name
        norm_num_groups=8,
        cross_attention_dim=cross_attention_dim,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=addition_time_embed_dim,
        projection_class_embeddings_input_dim=pooled_dim + 6 * addition_time_embed_dim,
    )


def build_vae(force_upcast: bool) -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.13025,
        force_upcast=force_upcast,
    )
    # Untrained, the latents would be nearly all posterior noise, and the two images of a pair as good as the same.
    with torch.no_grad():
        vae.quant_conv.weight[:4] *= 32
        vae.quant_conv.bias[4:] = -8
    return vae


def build_scheduler(prediction_type: str) -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        timestep_spacing="leading",
        steps_offset=1,
    )


def build_pipeline(
    folder: str | Path, seed: int = 0, prediction_type: str = "epsilon", force_upcast: bool = True
) -> None:
    """Write a tiny SDXL pipeline to `folder`; the same seed gives the same bytes."""
    tokenizer, tokenizer_2 = build_tokenizer("<|endoftext|>"), build_tokenizer("!")
    # Of different sizes, so that swapping the two text encoders cannot go unnoticed.
    config, config_2 = text_config(len(tokenizer), 32, "quick_gelu"), text_config(len(tokenizer_2), 64, "gelu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionXLPipeline(
            vae=build_vae(force_upcast),
            text_encoder=CLIPTextModel(config),
            text_encoder_2=CLIPTextModelWithProjection(config_2),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=build_unet(config.hidden_size + config_2.hidden_size, config_2.projection_dim),
            scheduler=build_scheduler(prediction_type),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)
    # vocab.json and merges.txt, as in SDXL's folder: the CLIPTokenizer of transformers 4 reads no tokenizer.json.
    tokenizer.backend_tokenizer.model.save(str(Path(folder) / "tokenizer"))
    tokenizer_2.backend_tokenizer.model.save(str(Path(folder) / "tokenizer_2"))


def outline(shape: str, centre: np.ndarray, radius: float) -> list[tuple[float, float]]:
    """Return the corners of a shape; a circle is a polygon of many."""
    corners = {"circle": 90, "square": 4, "triangle": 3, "star": 10}[shape]
    start = np.pi / 4 if shape == "square" else -np.pi / 2
    angles = start + 2 * np.pi * np.arange(corners) / corners
    radii = np.where(np.arange(corners) % 2, 0.45, 1.1) if shape == "star" else np.ones(corners)
    points = centre + radius * radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return [tuple(point) for point in points.tolist()]


def draw_cartoon(points: list[tuple[float, float]], colour: str, side: int) -> Image.Image:
    image = Image.new("RGB", (side, side), "white")
    canvas = ImageDraw.Draw(image)
    canvas.polygon(points, fill=COLOURS[colour])
    canvas.line([*points, *points[:2]], fill="black", width=side // 24, joint="curve")
    return image


def draw_photo(points: list[tuple[float, float]], colour: str, side: int, rng: np.random.Generator) -> Image.Image:
    y, x = np.mgrid[:side, :side] / side
    angle = rng.uniform(0, 2 * np.pi)
    background = 140 + 60 * (np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5))
    mask, shadow = Image.new("L", (side, side)), Image.new("L", (side, side))
    ImageDraw.Draw(mask).polygon(points, fill=255)
    ImageDraw.Draw(shadow).polygon([(px + 0.06 * side, py + 0.08 * side) for px, py in points], fill=255)
    shadow = np.asarray(shadow.filter(ImageFilter.GaussianBlur(side / 24))) / 255
    centre = np.mean(points, axis=0) / side
    light = 1.1 - 2 * np.hypot(x - centre[0] + 0.1, y - centre[1] + 0.1)
    body = np.array(COLOURS[colour]) * np.clip(light, 0.3, 1)[..., None] + 90 * np.clip(light - 0.8, 0, 1)[..., None]
    ground = np.repeat((background * (1 - 0.6 * shadow))[..., None], 3, axis=2)
    pixels = np.where(np.asarray(mask)[..., None] > 0, body, ground)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw(
    shape: str, colour: str, style: str, rng: np.random.Generator, size: int, framed: bool = False
) -> Image.Image:
    """Draw a shape as "cartoon" or "photo", in a dark frame or not; equal generators put it in the same place."""
    side = size * SUPERSAMPLING
    radius = rng.uniform(0.2, 0.32) * side
    centre = side / 2 + rng.uniform(-0.12, 0.12, size=2) * side
    points = outline(shape, centre, radius)
    image = draw_cartoon(points, colour, side) if style == "cartoon" else draw_photo(points, colour, side, rng)
    if framed:
        ImageDraw.Draw(image).rectangle((0, 0, side - 1, side - 1), outline=(25, 25, 25), width=side // 16)
    image = image.resize((size, size), Image.Resampling.BOX)
    if style == "cartoon":
        return image
    # Grain comes after the reduction, which would average it away.
    pixels = np.asarray(image) + rng.normal(0, 8, size=(size, size, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def caption(shape: str, colour: str) -> str:
    return f"{'an' if colour == 'orange' else 'a'} {colour} {shape}"


def pair(chosen: Image.Image, rejected: Image.Image, text: str, first: bool) -> dict:
    """One row as in Pick-Style; `first` says whether the chosen image is jpg_0."""
    images = (chosen, rejected) if first else (rejected, chosen)
    return {
        "caption": text,
        "jpg_0": png(images[0]),
        "jpg_1": png(images[1]),
        "label_0": int(first),
        "label_1": int(not first),
    }


def write_pairs(rows: list[dict], folder: str | Path, num_shards: int, row_group_size: int) -> None:
    """Write rows as parquet shards to `folder`/data."""
    data = Path(folder) / "data"
    data.mkdir(parents=True, exist_ok=True)
    for shard, indices in enumerate(np.array_split(np.arange(len(rows)), num_shards)):
        table = pa.Table.from_pylist([rows[i] for i in indices])
        path = data / f"train-{shard:05d}-of-{num_shards:05d}.parquet"
        pq.write_table(table, path, row_group_size=row_group_size)


def draw_pairs(
    folder: str | Path,
    num_pairs: int = 48,
    size: int = 64,
    num_shards: int = 3,
    row_group_size: int = 8,
    seed: int = 0,
    ties: int = 0,
) -> None:
    """Write a Pick-Style data set to `folder`/data; the same seed gives the same images whatever the `ties`."""
    rng = np.random.default_rng(seed)
    subjects = rng.permutation([(shape, colour) for shape in SHAPES for colour in COLOURS]).tolist()
    tied = set(rng.permutation(num_pairs)[:ties].tolist())
    rows = []
    for i, chosen in enumerate(rng.integers(2, size=num_pairs).tolist()):
        shape, colour = subjects[i % len(subjects)]
        cartoon, photo = (draw(shape, colour, style, np.random.default_rng([seed, i]), size) for style in STYLES)
        row = pair(cartoon, photo, caption(shape, colour), first=chosen == 0)
        rows.append(row | ({"label_0": 1, "label_1": 1} if i in tied else {}))
    write_pairs(rows, folder, num_shards, row_group_size)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a tiny SDXL pipeline and a preference data set.")
    parser.add_argument("folder", type=Path, help="where to write pipeline/ and pairs/")
    folder = parser.parse_args().folder
    build_pipeline(folder / "pipeline")
    draw_pairs(folder / "pairs")
    print(folder / "pipeline")
    print(folder / "pairs")


if __name__ == "__main__":
    main()
