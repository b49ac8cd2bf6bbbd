"""Small scorers of the published architectures, made locally, and what they should say, worked out by hand.

`build_scorers` writes one folder or file for each of the script's scorer flags; `expected_scores` computes the scores
again from their weights, with preprocessing and formulas of its own.
"""

import math
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from small_world import COLOURS, SHAPES, build_tokenizer
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipTokenizer,
    SiglipVisionConfig,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil


SIDE, PATCH = 32, 8
MEAN, STD = (0.5, 0.4, 0.3), (0.3, 0.2, 0.25)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HEADS, LAYERS = 2, 2
TEXT_WIDTH, IMAGE_WIDTH, JOINT_WIDTH, BLIP_WIDTH = 32, 48, 24, 128
# Keys and shapes of `sac+logos+ava1-l14-linearMSE.pth`.
AESTHETIC_LAYERS = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}


def clip_config(tokenizer, projection_dim, hidden_act):
    shared = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "projection_dim": projection_dim}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        # As the published configs have it, wrongly.
        eos_token_id=2,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act=hidden_act,
        **shared,
    )
    vision = CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH,
        intermediate_size=4 * IMAGE_WIDTH,
        image_size=SIDE,
        patch_size=PATCH,
        hidden_act=hidden_act,
        **shared,
    )
    return CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=projection_dim)


def shake(model):
    """Move every weight away from the zeros and ones that hide a mistake, and draw the vectors apart."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not name.startswith("logit_"):
                weight += torch.randn_like(weight) * (0.3 if weight.ndim == 1 else 0.1)
    return model


def save_clip(folder, tokenizer, projection_dim=JOINT_WIDTH, weights=True):
    config = clip_config(tokenizer, projection_dim, "quick_gelu")
    if weights:
        shake(CLIPModel(config)).save_pretrained(folder)
    else:
        clip_config(tokenizer, projection_dim, "gelu").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    crop = {"height": SIDE, "width": SIDE}
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=crop, image_mean=MEAN, image_std=STD)
    processor.save_pretrained(folder)


def open_clip_weights(vocab_size):
    """Weights with the names and shapes of open_clip's CLIP of a ViT and a text transformer."""
    grid = (SIDE // PATCH) ** 2
    shapes = {
        "positional_embedding": (77, TEXT_WIDTH),
        "text_projection": (TEXT_WIDTH, JOINT_WIDTH),
        "visual.class_embedding": (IMAGE_WIDTH,),
        "visual.positional_embedding": (grid + 1, IMAGE_WIDTH),
        "visual.proj": (IMAGE_WIDTH, JOINT_WIDTH),
        "visual.conv1.weight": (IMAGE_WIDTH, 3, PATCH, PATCH),
        "token_embedding.weight": (vocab_size, TEXT_WIDTH),
    }
    norms = {"visual.ln_pre": IMAGE_WIDTH, "visual.ln_post": IMAGE_WIDTH, "ln_final": TEXT_WIDTH}
    for tower, width in (("visual.transformer", IMAGE_WIDTH), ("transformer", TEXT_WIDTH)):
        for layer in range(LAYERS):
            block = f"{tower}.resblocks.{layer}"
            norms.update({f"{block}.ln_1": width, f"{block}.ln_2": width})
            linears = {"attn.in_proj_": (3, 1), "attn.out_proj.": (1, 1), "mlp.c_fc.": (4, 1), "mlp.c_proj.": (1, 4)}
            for name, (rows, columns) in linears.items():
                shapes[f"{block}.{name}weight"] = (rows * width, columns * width)
                shapes[f"{block}.{name}bias"] = (rows * width,)
    for norm, width in norms.items():
        shapes.update({f"{norm}.weight": (width,), f"{norm}.bias": (width,)})
    weights = {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    for norm in norms:
        weights[f"{norm}.weight"] += 1
    return {**weights, "logit_scale": torch.tensor(4.6)}


def build_siglip(folder):
    corpus = folder / "corpus.txt"
    folder.mkdir()
    corpus.write_text("\n".join(f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "spiece"),
        vocab_size=40,
        hard_vocab_limit=False,
        pad_id=-1,
        bos_id=-1,
        eos_id=1,
        unk_id=2,
        control_symbols=["<pad>"],
        minloglevel=2,
    )
    tokenizer = SiglipTokenizer(vocab_file=str(folder / "spiece.model"))
    tokenizer.save_pretrained(folder)
    shared = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "hidden_size": 32, "intermediate_size": 64}
    text = SiglipTextConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **shared)
    vision = SiglipVisionConfig(image_size=SIDE, patch_size=PATCH, **shared)
    model = shake(SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())))
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
        model.logit_bias.fill_(-0.5)
    model.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    SiglipImageProcessorPil(size=size, image_mean=MEAN, image_std=STD).save_pretrained(folder)


def imagereward_weights(vocab_size):
    """Weights with the names and shapes of `ImageReward.pt`, of heads of 64 and two layers a tower."""
    shapes = {"visual_encoder.cls_token": (1, 1, BLIP_WIDTH), "visual_encoder.patch_embed.proj.bias": (BLIP_WIDTH,)}
    shapes["visual_encoder.pos_embed"] = (1, (SIDE // PATCH) ** 2 + 1, BLIP_WIDTH)
    shapes["visual_encoder.patch_embed.proj.weight"] = (BLIP_WIDTH, 3, PATCH, PATCH)
    table = "text_encoder.embeddings"
    shapes |= {f"{table}.word_embeddings.weight": (vocab_size, 768), f"{table}.position_embeddings.weight": (48, 768)}
    linears, norms = {}, {"visual_encoder.norm": BLIP_WIDTH, f"{table}.LayerNorm": 768}
    for layer in range(LAYERS):
        block = f"visual_encoder.blocks.{layer}"
        norms |= {f"{block}.norm1": BLIP_WIDTH, f"{block}.norm2": BLIP_WIDTH}
        linears |= {f"{block}.attn.qkv": (3 * BLIP_WIDTH, BLIP_WIDTH), f"{block}.attn.proj": (BLIP_WIDTH, BLIP_WIDTH)}
        linears |= {f"{block}.mlp.fc1": (256, BLIP_WIDTH), f"{block}.mlp.fc2": (BLIP_WIDTH, 256)}
        block = f"text_encoder.encoder.layer.{layer}"
        for attention, width in (("attention", 768), ("crossattention", BLIP_WIDTH)):
            linears |= {f"{block}.{attention}.self.{name}": (768, width) for name in ("key", "value")}
            linears |= {f"{block}.{attention}.{name}": (768, 768) for name in ("self.query", "output.dense")}
            norms[f"{block}.{attention}.output.LayerNorm"] = 768
        linears |= {f"{block}.intermediate.dense": (256, 768), f"{block}.output.dense": (768, 256)}
        norms[f"{block}.output.LayerNorm"] = 768
    for name, (rows, columns) in linears.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    for name, width in norms.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    weights = {f"blip.{name}": torch.randn(shape) / max(shape[-1], 9) ** 0.5 for name, shape in shapes.items()}
    for name in norms:
        weights[f"blip.{name}.weight"] += 1
    return weights | {"blip.text_encoder.embeddings.position_ids": torch.arange(48)[None]}


def build_bert_tokenizer(folder):
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "an", *COLOURS, *SHAPES]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    BertConfig(vocab_size=len(words)).save_pretrained(folder)
    return len(words)


def build_scorers(folder):
    """Write the scorers; returns {flag: path} for each of the script's flags."""
    folder = Path(folder)
    tokenizer = build_tokenizer("<|endoftext|>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_clip(folder / "pickscore", tokenizer)
        save_clip(folder / "clip", tokenizer)
        save_clip(folder / "vit-l-14", tokenizer, projection_dim=768)
        save_clip(folder / "vit-h-14", tokenizer, weights=False)
        weights = {name: weight.half() for name, weight in open_clip_weights(len(tokenizer)).items()}
        torch.save({"state_dict": weights}, folder / "hps.pt")
        head = {
            f"layers.{i}.weight": torch.randn(shape[::-1]) / shape[0] ** 0.5 for i, shape in AESTHETIC_LAYERS.items()
        }
        head.update({f"layers.{i}.bias": torch.randn(shape[1]) for i, shape in AESTHETIC_LAYERS.items()})
        torch.save(head, folder / "aesthetic.pth")
        reward = imagereward_weights(build_bert_tokenizer(folder / "bert"))
        torch.save(reward | {f"mlp.{name}": weight / 2 for name, weight in head.items()}, folder / "ImageReward.pt")
        build_siglip(folder / "siglip")
        config = Dinov2Config(
            hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=HEADS, image_size=SIDE, patch_size=PATCH
        )
        shake(Dinov2Model(config)).save_pretrained(folder / "dinov2")
    size, crop = {"shortest_edge": 40}, {"height": SIDE, "width": SIDE}
    BitImageProcessorPil(size=size, crop_size=crop, image_mean=MEAN, image_std=STD).save_pretrained(folder / "dinov2")
    return {
        "pickscore_model": folder / "pickscore",
        "pickscore_processor": folder / "vit-h-14",
        "hps_model": folder / "vit-h-14",
        "hps_weights": folder / "hps.pt",
        "aesthetic_model": folder / "vit-l-14",
        "aesthetic_weights": folder / "aesthetic.pth",
        "imagereward_weights": folder / "ImageReward.pt",
        "imagereward_processor": folder / "bert",
        "clip_model": folder / "clip",
        "siglip_model": folder / "siglip",
        "dinov2_model": folder / "dinov2",
    }


# What they should say ------------------------------------------------------------------------------------------------


def to_pixels(image, mean=MEAN, std=STD):
    """[1, 3, H, W], normalised."""
    pixels = (np.asarray(image, dtype=np.float64) / 255 - mean) / std
    return torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]


def centre(image, shortest=SIDE, **options):
    """The middle square of an image whose shorter side is brought to `shortest` pixels."""
    width, height = image.size
    size = (
        (shortest, int(shortest * height / width)) if width <= height else (int(shortest * width / height), shortest)
    )
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    return to_pixels(image.crop((left, top, left + SIDE, top + SIDE)), **options)


def cubic(length, new):
    """[new, length]: plain cubic interpolation, four pixels each, however many lie between two of the new ones."""
    matrix = np.zeros((new, length))
    for row in range(new):
        x = (row + 0.5) * length / new - 0.5
        for pixel in range(math.floor(x) - 1, math.floor(x) + 3):
            d, a = abs(x - pixel), -0.75
            weight = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[row, min(max(pixel, 0), length - 1)] += weight
    return matrix


def whole(image, antialias=True):
    """All of an image in a black square; each channel resized as floats, with antialiasing by Pillow."""
    pixels = np.zeros((SIDE, SIDE, 3))
    width, height = (round(length * SIDE / max(image.size)) for length in image.size)
    left, top = (SIDE - width) // 2, (SIDE - height) // 2
    for channel, plane in enumerate(image.split()):
        plane = np.asarray(plane, dtype=np.float32)
        if antialias:
            plane = Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC)
        else:
            plane = cubic(image.height, height) @ plane @ cubic(image.width, width).T
        pixels[top : top + height, left : left + width, channel] = plane
    return to_pixels(pixels)


def tokens(folder, prompt, limit):
    """The tokens of a text; one that is too long loses what stands before its last, the end of the text."""
    ids = AutoTokenizer.from_pretrained(folder)(prompt).input_ids
    return ids[: limit - 1] + ids[-1:] if len(ids) > limit else ids


def cosine(a, b):
    return float((a * b).sum() / a.norm() / b.norm())


def clip_vectors(folder, processor, image, prompt):
    """The projected vectors of transformers' CLIP towers, by their last layers' weights; texts are not filled up."""
    model = CLIPModel.from_pretrained(folder).eval()
    weights = model.state_dict()
    hidden = model.vision_model(pixel_values=centre(image)).last_hidden_state[0, 0]
    norm = [weights[f"vision_model.post_layernorm.{part}"] for part in ("weight", "bias")]
    image_vector = weights["visual_projection.weight"] @ F.layer_norm(hidden, (IMAGE_WIDTH,), *norm)
    ids = torch.tensor([tokens(processor, prompt, 77)])
    text_vector = weights["text_projection.weight"] @ model.text_model(input_ids=ids).last_hidden_state[0, -1]
    return image_vector, text_vector, float(weights["logit_scale"])


def open_clip_block(weights, block, x, mask):
    """One residual block of open_clip, through torch's own multi-head attention."""
    width = x.shape[-1]
    layer = {name.removeprefix(f"{block}."): value for name, value in weights.items() if name.startswith(f"{block}.")}
    attention = torch.nn.MultiheadAttention(width, HEADS, batch_first=True)
    attention.load_state_dict({n.removeprefix("attn."): v for n, v in layer.items() if n.startswith("attn.")})
    y = F.layer_norm(x, (width,), layer["ln_1.weight"], layer["ln_1.bias"])
    x = x + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
    y = F.layer_norm(x, (width,), layer["ln_2.weight"], layer["ln_2.bias"])
    y = F.gelu(y @ layer["mlp.c_fc.weight"].T + layer["mlp.c_fc.bias"])
    return x + y @ layer["mlp.c_proj.weight"].T + layer["mlp.c_proj.bias"]


def open_clip_vectors(weights, folder, pixels, prompt):
    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = F.conv2d(pixels, weights["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = (
        torch.cat([weights["visual.class_embedding"].expand(1, 1, -1), x], dim=1)
        + weights["visual.positional_embedding"]
    )
    x = norm("visual.ln_pre", x)
    for layer in range(LAYERS):
        x = open_clip_block(weights, f"visual.transformer.resblocks.{layer}", x, None)
    image_vector = norm("visual.ln_post", x[:, 0]) @ weights["visual.proj"]
    ids = torch.tensor(tokens(folder, prompt, 77))
    # open_clip fills texts up with zeros and reads the vector at the highest token, the end of the text.
    ids = F.pad(ids, (0, 77 - len(ids)))
    x = (weights["token_embedding.weight"][ids] + weights["positional_embedding"])[None]
    mask = torch.full((77, 77), -math.inf).triu(1)
    for layer in range(LAYERS):
        x = open_clip_block(weights, f"transformer.resblocks.{layer}", x, mask)
    return image_vector[0], norm("ln_final", x)[0, ids.argmax()] @ weights["text_projection"]


def attend(layer, names, x, other):
    """Attention of heads of 64 from the weights of its three inputs, each a matrix or its share of one."""
    query, key, value = (
        F.linear(source, layer[f"{name}.weight"], layer[f"{name}.bias"]).unflatten(-1, (-1, 64)).transpose(0, 1)
        for name, source in zip(names, (x, other, other))
    )
    scores = query @ key.transpose(1, 2) / 8
    return (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)


def imagereward_vector(weights, folder, image, prompt):
    """The first vector of BLIP's text encoder, as timm's vision transformer and BERT compute."""

    def norm(name, x, eps=1e-12):
        return F.layer_norm(x, x.shape[-1:], weights[f"blip.{name}.weight"], weights[f"blip.{name}.bias"], eps)

    def linear(name, x):
        return F.linear(x, weights[f"blip.{name}.weight"], weights[f"blip.{name}.bias"])

    eyes, reader = "visual_encoder", "text_encoder"
    x = centre(image, mean=CLIP_MEAN, std=CLIP_STD)
    kernel = [weights[f"blip.{eyes}.patch_embed.proj.{part}"] for part in ("weight", "bias")]
    x = F.conv2d(x, *kernel, stride=PATCH).flatten(2)[0].T
    x = torch.cat([weights[f"blip.{eyes}.cls_token"][0], x]) + weights[f"blip.{eyes}.pos_embed"][0]
    for block in [f"{eyes}.blocks.{layer}" for layer in range(LAYERS)]:
        y = norm(f"{block}.norm1", x, 1e-6)
        parts = [weights[f"blip.{block}.attn.qkv.{part}"].chunk(3) for part in ("weight", "bias")]
        layer = {f"{n}.{part}": value[n] for part, value in zip(("weight", "bias"), parts) for n in range(3)}
        x = x + linear(f"{block}.attn.proj", attend(layer, range(3), y, y))
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    patches = norm(f"{eyes}.norm", x, 1e-6)
    ids = tokens(folder, prompt, 35)
    table = f"blip.{reader}.embeddings"
    x = weights[f"{table}.word_embeddings.weight"][ids] + weights[f"{table}.position_embeddings.weight"][: len(ids)]
    x = norm(f"{reader}.embeddings.LayerNorm", x)
    for block in [f"{reader}.encoder.layer.{layer}" for layer in range(LAYERS)]:
        for attention in ("attention", "crossattention"):
            names = [f"blip.{block}.{attention}.self.{name}" for name in ("query", "key", "value")]
            y = attend(weights, names, x, x if attention == "attention" else patches)
            x = norm(f"{block}.{attention}.output.LayerNorm", x + linear(f"{block}.{attention}.output.dense", y))
        y = linear(f"{block}.output.dense", F.gelu(linear(f"{block}.intermediate.dense", x)))
        x = norm(f"{block}.output.LayerNorm", x + y)
    return x[0]


@torch.no_grad()
def expected_score(scorer, flags, image, prompt, references=()):
    """What a scorer must say of one image."""
    if scorer == "pickscore":
        *vectors, scale = clip_vectors(flags["pickscore_model"], flags["pickscore_processor"], image, prompt)
        return math.exp(scale) * cosine(*vectors)
    if scorer == "clip":
        return max(100 * cosine(*clip_vectors(flags["clip_model"], flags["clip_model"], image, prompt)[:2]), 0)
    if scorer in ("hps", "hps_no_antialias"):
        weights = {name: weight.float() for name, weight in torch.load(flags["hps_weights"])["state_dict"].items()}
        pixels = whole(image, antialias=scorer == "hps")
        return 100 * cosine(*open_clip_vectors(weights, flags["hps_model"], pixels, prompt))
    if scorer == "aesthetic":
        x = clip_vectors(flags["aesthetic_model"], flags["aesthetic_model"], image, prompt)[0]
        x, layers = x / x.norm(), torch.load(flags["aesthetic_weights"])
        for i in AESTHETIC_LAYERS:
            x = layers[f"layers.{i}.weight"] @ x + layers[f"layers.{i}.bias"]
        return float(x)
    if scorer == "imagereward":
        layers = torch.load(flags["imagereward_weights"])
        x = imagereward_vector(layers, flags["imagereward_processor"], image, prompt)
        for i in AESTHETIC_LAYERS:
            x = layers[f"mlp.layers.{i}.weight"] @ x + layers[f"mlp.layers.{i}.bias"]
        return (float(x) - 0.16717362830052426) / 1.0333394966054072
    if scorer == "siglip":
        model = SiglipModel.from_pretrained(flags["siglip_model"]).eval()
        pixels = to_pixels(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        ids = tokens(flags["siglip_model"], prompt, 16)
        ids = torch.tensor([ids + [1] * (16 - len(ids))])
        vectors = model.vision_model(pixel_values=pixels)[1][0], model.text_model(input_ids=ids)[1][0]
        return 100 / (1 + math.exp(-(math.exp(1.5) * cosine(*vectors) - 0.5)))
    model = Dinov2Model.from_pretrained(flags["dinov2_model"]).eval()
    vectors = [model(pixel_values=centre(picture, 40))[0][0, 0] for picture in (image, *references)]
    return 100 * sum(cosine(vectors[0], reference) for reference in vectors[1:]) / len(references)


def remove_vocabulary(folder):
    """Leave a tokenizer's config, as if the larger files had not been downloaded."""
    for file in folder.iterdir():
        if file.name in ("vocab.json", "merges.txt", "tokenizer.json"):
            file.unlink()


def remove_weight(folder):
    """Remove the first weight from a model's file, and return its name."""
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    name = min(weights)
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    return name


def spoil_weights(folder, ending):
    """Make NaN of a model's weights whose names end so."""
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    for name in weights:
        if name.endswith(ending):
            weights[name][:] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
