"""Small scorers of the published architectures, and an independent implementation of their scores.

`build_scorers` writes one folder or file for each scorer flag of the evaluation. `expected_score` computes a score
from these weights, with its own preprocessing and formulas.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image
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


# Images: side, side of a patch, and the normalization.
SIDE = 32
PATCH = 8
MEAN = (0.5, 0.4, 0.3)
STD = (0.3, 0.2, 0.25)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
NUM_PATCHES = (SIDE // PATCH) ** 2

# Transformers.
HEADS = 2
LAYERS = 2
TEXT_WIDTH = 32
IMAGE_WIDTH = 48
JOINT_WIDTH = 24
BLIP_WIDTH = 128
BERT_WIDTH = 768
MLP_WIDTH = 256  # of BLIP and BERT

# Arguments of several configs and image processors.
TRANSFORMER = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
VISION = {"image_size": SIDE, "patch_size": PATCH}
SQUARE = {"height": SIDE, "width": SIDE}
NORMALIZATION = {"image_mean": MEAN, "image_std": STD}

# Keys and shapes of `sac+logos+ava1-l14-linearMSE.pth`.
AESTHETIC_LAYERS = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}


def clip_config(tokenizer, projection_dim, hidden_act):
    shared = {**TRANSFORMER, "projection_dim": projection_dim, "hidden_act": hidden_act}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=2,  # wrong, as in the published configs
        pad_token_id=tokenizer.pad_token_id,
        **shared,
    )
    vision = CLIPVisionConfig(hidden_size=IMAGE_WIDTH, intermediate_size=4 * IMAGE_WIDTH, **VISION, **shared)
    return CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=projection_dim)


def shake(model):
    """Add noise to all weights: zeros and ones hide mistakes, and make all embeddings alike."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not name.startswith("logit_"):
                weight += torch.randn_like(weight) * (0.3 if weight.ndim == 1 else 0.1)
    return model


def save_clip(folder, tokenizer, projection_dim=JOINT_WIDTH, weights=True):
    """Write a CLIP with its tokenizer and image processor, or only its config instead of the weights."""
    if weights:
        config = clip_config(tokenizer, projection_dim, "quick_gelu")
        shake(CLIPModel(config)).save_pretrained(folder)
    else:
        clip_config(tokenizer, projection_dim, "gelu").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE, **NORMALIZATION)
    processor.save_pretrained(folder)


def open_clip_weights(vocab_size):
    """Weights with the names and shapes of open_clip's CLIP of a ViT and a text transformer."""
    shapes = {
        "positional_embedding": (77, TEXT_WIDTH),
        "text_projection": (TEXT_WIDTH, JOINT_WIDTH),
        "visual.class_embedding": (IMAGE_WIDTH,),
        "visual.positional_embedding": (NUM_PATCHES + 1, IMAGE_WIDTH),
        "visual.proj": (IMAGE_WIDTH, JOINT_WIDTH),
        "visual.conv1.weight": (IMAGE_WIDTH, 3, PATCH, PATCH),
        "token_embedding.weight": (vocab_size, TEXT_WIDTH),
    }
    norms = {"visual.ln_pre": IMAGE_WIDTH, "visual.ln_post": IMAGE_WIDTH, "ln_final": TEXT_WIDTH}
    for tower, width in (("visual.transformer", IMAGE_WIDTH), ("transformer", TEXT_WIDTH)):
        for layer in range(LAYERS):
            block = f"{tower}.resblocks.{layer}"
            norms[f"{block}.ln_1"] = width
            norms[f"{block}.ln_2"] = width
            shapes[f"{block}.attn.in_proj_weight"] = (3 * width, width)
            shapes[f"{block}.attn.in_proj_bias"] = (3 * width,)
            shapes[f"{block}.attn.out_proj.weight"] = (width, width)
            shapes[f"{block}.attn.out_proj.bias"] = (width,)
            shapes[f"{block}.mlp.c_fc.weight"] = (4 * width, width)
            shapes[f"{block}.mlp.c_fc.bias"] = (4 * width,)
            shapes[f"{block}.mlp.c_proj.weight"] = (width, 4 * width)
            shapes[f"{block}.mlp.c_proj.bias"] = (width,)
    for norm, width in norms.items():
        shapes[f"{norm}.weight"] = (width,)
        shapes[f"{norm}.bias"] = (width,)

    weights = {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    for norm in norms:
        weights[f"{norm}.weight"] += 1
    weights["logit_scale"] = torch.tensor(4.6)
    return weights


def build_siglip(folder):
    folder.mkdir()

    # Tokenizer.
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(f"a {colour} {shape}" for colour, shape in itertools.product(COLOURS, SHAPES)))
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

    # Model.
    shared = {**TRANSFORMER, "hidden_size": 32, "intermediate_size": 64}
    text = SiglipTextConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **shared)
    vision = SiglipVisionConfig(**VISION, **shared)
    model = shake(SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())))
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
        model.logit_bias.fill_(-0.5)
    model.save_pretrained(folder)

    # Image processor.
    SiglipImageProcessorPil(size=SQUARE, **NORMALIZATION).save_pretrained(folder)


def imagereward_weights(vocab_size):
    """Weights with the names and shapes of `ImageReward.pt`, with heads of 64 and two layers per tower."""
    image = "visual_encoder"
    embeddings = "text_encoder.embeddings"
    shapes = {
        f"{image}.cls_token": (1, 1, BLIP_WIDTH),
        f"{image}.patch_embed.proj.bias": (BLIP_WIDTH,),
        f"{image}.pos_embed": (1, NUM_PATCHES + 1, BLIP_WIDTH),
        f"{image}.patch_embed.proj.weight": (BLIP_WIDTH, 3, PATCH, PATCH),
        f"{embeddings}.word_embeddings.weight": (vocab_size, BERT_WIDTH),
        f"{embeddings}.position_embeddings.weight": (48, BERT_WIDTH),
    }
    norms = {f"{image}.norm": BLIP_WIDTH, f"{embeddings}.LayerNorm": BERT_WIDTH}
    linears = {}  # {name: (outputs, inputs)}
    for layer in range(LAYERS):
        block = f"{image}.blocks.{layer}"
        norms[f"{block}.norm1"] = BLIP_WIDTH
        norms[f"{block}.norm2"] = BLIP_WIDTH
        linears[f"{block}.attn.qkv"] = (3 * BLIP_WIDTH, BLIP_WIDTH)
        linears[f"{block}.attn.proj"] = (BLIP_WIDTH, BLIP_WIDTH)
        linears[f"{block}.mlp.fc1"] = (MLP_WIDTH, BLIP_WIDTH)
        linears[f"{block}.mlp.fc2"] = (BLIP_WIDTH, MLP_WIDTH)

        block = f"text_encoder.encoder.layer.{layer}"
        for attention, width in (("attention", BERT_WIDTH), ("crossattention", BLIP_WIDTH)):
            linears[f"{block}.{attention}.self.key"] = (BERT_WIDTH, width)
            linears[f"{block}.{attention}.self.value"] = (BERT_WIDTH, width)
            linears[f"{block}.{attention}.self.query"] = (BERT_WIDTH, BERT_WIDTH)
            linears[f"{block}.{attention}.output.dense"] = (BERT_WIDTH, BERT_WIDTH)
            norms[f"{block}.{attention}.output.LayerNorm"] = BERT_WIDTH
        linears[f"{block}.intermediate.dense"] = (MLP_WIDTH, BERT_WIDTH)
        linears[f"{block}.output.dense"] = (BERT_WIDTH, MLP_WIDTH)
        norms[f"{block}.output.LayerNorm"] = BERT_WIDTH
    for name, (outputs, inputs) in linears.items():
        shapes[f"{name}.weight"] = (outputs, inputs)
        shapes[f"{name}.bias"] = (outputs,)
    for name, width in norms.items():
        shapes[f"{name}.weight"] = (width,)
        shapes[f"{name}.bias"] = (width,)

    weights = {f"blip.{name}": torch.randn(shape) / max(shape[-1], 9) ** 0.5 for name, shape in shapes.items()}
    for name in norms:
        weights[f"blip.{name}.weight"] += 1
    weights[f"blip.{embeddings}.position_ids"] = torch.arange(48)[None]
    return weights


def build_bert_tokenizer(folder):
    """Write a tokenizer; returns the size of its vocabulary."""
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "an", *COLOURS, *SHAPES]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    BertConfig(vocab_size=len(words)).save_pretrained(folder)
    return len(words)


def aesthetic_head():
    """A head with the names and shapes of `sac+logos+ava1-l14-linearMSE.pth`."""
    head = {}
    for i, (inputs, outputs) in AESTHETIC_LAYERS.items():
        head[f"layers.{i}.weight"] = torch.randn(outputs, inputs) / inputs**0.5
        head[f"layers.{i}.bias"] = torch.randn(outputs)
    return head


def build_dinov2(folder):
    config = Dinov2Config(hidden_size=32, **TRANSFORMER, **VISION)
    shake(Dinov2Model(config)).save_pretrained(folder)
    processor = BitImageProcessorPil(size={"shortest_edge": 40}, crop_size=SQUARE, **NORMALIZATION)
    processor.save_pretrained(folder)


def build_scorers(folder):
    """Write the scorers; returns {flag: path} for each scorer flag."""
    folder = Path(folder)
    tokenizer = build_tokenizer("<|endoftext|>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_clip(folder / "pickscore", tokenizer)
        save_clip(folder / "clip", tokenizer)
        save_clip(folder / "vit-l-14", tokenizer, projection_dim=768)
        save_clip(folder / "vit-h-14", tokenizer, weights=False)

        hps = {name: weight.half() for name, weight in open_clip_weights(len(tokenizer)).items()}
        torch.save({"state_dict": hps}, folder / "hps.pt")

        head = aesthetic_head()
        torch.save(head, folder / "aesthetic.pth")

        reward = imagereward_weights(build_bert_tokenizer(folder / "bert"))
        for name, weight in head.items():
            reward[f"mlp.{name}"] = weight / 2
        torch.save(reward, folder / "ImageReward.pt")

        build_siglip(folder / "siglip")
        build_dinov2(folder / "dinov2")
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


# Expected scores -----------------------------------------------------------------------------------------------------
def to_pixels(image, mean=MEAN, std=STD):
    """Normalized pixels (1, 3, height, width)."""
    pixels = (np.asarray(image, dtype=np.float64) / 255 - mean) / std
    return torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]


def crop_centre(image, shortest=SIDE, **options):
    """Pixels of the central square, after the shorter side of the image was resized to `shortest`."""
    width, height = image.size
    if width <= height:
        size = (shortest, int(shortest * height / width))
    else:
        size = (int(shortest * width / height), shortest)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left = (size[0] - SIDE) // 2
    top = (size[1] - SIDE) // 2
    return to_pixels(image.crop((left, top, left + SIDE, top + SIDE)), **options)


def cubic_matrix(length, new_length):
    """A matrix (new_length, length) that resizes by cubic interpolation of four pixels, without antialiasing."""
    a = -0.75
    matrix = np.zeros((new_length, length))
    for row in range(new_length):
        x = (row + 0.5) * length / new_length - 0.5
        for pixel in range(math.floor(x) - 1, math.floor(x) + 3):
            distance = abs(x - pixel)
            if distance <= 1:
                weight = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
            else:
                weight = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
            matrix[row, min(max(pixel, 0), length - 1)] += weight
    return matrix


def fit_into_square(image, antialias):
    """Pixels of the full image in a black square; channels are resized as floats, with antialiasing by Pillow."""
    width = round(image.width * SIDE / max(image.size))
    height = round(image.height * SIDE / max(image.size))
    left = (SIDE - width) // 2
    top = (SIDE - height) // 2
    pixels = np.zeros((SIDE, SIDE, 3))
    for i, channel in enumerate(image.split()):
        channel = np.asarray(channel, dtype=np.float32)
        if antialias:
            channel = Image.fromarray(channel).resize((width, height), Image.Resampling.BICUBIC)
        else:
            channel = cubic_matrix(image.height, height) @ channel @ cubic_matrix(image.width, width).T
        pixels[top : top + height, left : left + width, i] = channel
    return to_pixels(pixels)


def tokenize(folder, prompt, limit):
    """The tokens of a prompt. If there are too many, the last one, which ends the text, stays the last one."""
    ids = AutoTokenizer.from_pretrained(folder)(prompt).input_ids
    if len(ids) > limit:
        return ids[: limit - 1] + ids[-1:]
    return ids


def cosine(a, b):
    return float((a * b).sum() / a.norm() / b.norm())


def clip_image_embedding(folder, image):
    """The image embedding of a CLIP, projected by hand."""
    model = CLIPModel.from_pretrained(folder).eval()
    weights = model.state_dict()
    hidden = model.vision_model(pixel_values=crop_centre(image)).last_hidden_state[0, 0]
    hidden = layer_norm(weights, "vision_model.post_layernorm", hidden)
    return weights["visual_projection.weight"] @ hidden


def clip_text_embedding(folder, processor, prompt):
    """The text embedding of a CLIP, projected by hand, without padding."""
    model = CLIPModel.from_pretrained(folder).eval()
    ids = torch.tensor([tokenize(processor, prompt, 77)])
    hidden = model.text_model(input_ids=ids).last_hidden_state[0, -1]
    return model.state_dict()["text_projection.weight"] @ hidden


def layer_norm(weights, name, x, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def linear(weights, name, x):
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def part_of(weights, prefix):
    """The weights whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def open_clip_block(weights, x, mask):
    """One residual block of open_clip, with torch's own multi-head attention."""
    attention = torch.nn.MultiheadAttention(x.shape[-1], HEADS, batch_first=True)
    attention.load_state_dict(part_of(weights, "attn."))
    y = layer_norm(weights, "ln_1", x)
    x = x + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
    y = layer_norm(weights, "ln_2", x)
    y = F.gelu(y @ weights["mlp.c_fc.weight"].T + weights["mlp.c_fc.bias"])
    return x + y @ weights["mlp.c_proj.weight"].T + weights["mlp.c_proj.bias"]


def open_clip_image_embedding(weights, pixels):
    weights = part_of(weights, "visual.")
    x = F.conv2d(pixels, weights["conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([weights["class_embedding"].expand(1, 1, -1), x], dim=1)
    x = layer_norm(weights, "ln_pre", x + weights["positional_embedding"])
    for layer in range(LAYERS):
        x = open_clip_block(part_of(weights, f"transformer.resblocks.{layer}."), x, None)
    return (layer_norm(weights, "ln_post", x[:, 0]) @ weights["proj"])[0]


def open_clip_text_embedding(weights, folder, prompt):
    # open_clip pads texts with zeros and reads the position of the highest token, which is the end of the text.
    ids = torch.tensor(tokenize(folder, prompt, 77))
    ids = F.pad(ids, (0, 77 - len(ids)))
    x = (weights["token_embedding.weight"][ids] + weights["positional_embedding"])[None]
    mask = torch.full((77, 77), -math.inf).triu(1)
    for layer in range(LAYERS):
        x = open_clip_block(part_of(weights, f"transformer.resblocks.{layer}."), x, mask)
    return layer_norm(weights, "ln_final", x)[0, ids.argmax()] @ weights["text_projection"]


def attend(query, key, value):
    """Attention with heads of 64; all arguments are (positions, width)."""
    query, key, value = [x.unflatten(-1, (-1, 64)).transpose(0, 1) for x in (query, key, value)]
    scores = query @ key.transpose(1, 2) / 8
    return (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)


def blip_image_embeddings(weights, image):
    """The embeddings of BLIP's patches, as timm's vision transformer computes them."""
    x = crop_centre(image, mean=CLIP_MEAN, std=CLIP_STD)
    x = F.conv2d(x, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=PATCH)
    x = torch.cat([weights["cls_token"][0], x.flatten(2)[0].T]) + weights["pos_embed"][0]
    for i in range(LAYERS):
        block = part_of(weights, f"blocks.{i}.")
        query, key, value = linear(block, "attn.qkv", layer_norm(block, "norm1", x, 1e-6)).chunk(3, dim=-1)
        x = x + linear(block, "attn.proj", attend(query, key, value))
        y = F.gelu(linear(block, "mlp.fc1", layer_norm(block, "norm2", x, 1e-6)))
        x = x + linear(block, "mlp.fc2", y)
    return layer_norm(weights, "norm", x, 1e-6)


def bert_attention(weights, x, other):
    """A residual attention of BERT from `x` to `other`."""
    query = linear(weights, "self.query", x)
    key = linear(weights, "self.key", other)
    value = linear(weights, "self.value", other)
    y = linear(weights, "output.dense", attend(query, key, value))
    return layer_norm(weights, "output.LayerNorm", x + y, 1e-12)


def imagereward_embedding(weights, folder, image, prompt):
    """The first embedding of BLIP's text encoder, a BERT with attention to the patches of the image."""
    patches = blip_image_embeddings(part_of(weights, "blip.visual_encoder."), image)
    weights = part_of(weights, "blip.text_encoder.")
    ids = tokenize(folder, prompt, 35)
    x = weights["embeddings.word_embeddings.weight"][ids]
    x = x + weights["embeddings.position_embeddings.weight"][: len(ids)]
    x = layer_norm(weights, "embeddings.LayerNorm", x, 1e-12)
    for i in range(LAYERS):
        block = part_of(weights, f"encoder.layer.{i}.")
        x = bert_attention(part_of(block, "attention."), x, x)
        x = bert_attention(part_of(block, "crossattention."), x, patches)
        y = linear(block, "output.dense", F.gelu(linear(block, "intermediate.dense", x)))
        x = layer_norm(block, "output.LayerNorm", x + y, 1e-12)
    return x[0]


def apply_head(weights, x):
    for i in AESTHETIC_LAYERS:
        x = linear(weights, f"layers.{i}", x)
    return float(x)


def pickscore(flags, image, prompt):
    folder = flags["pickscore_model"]
    scale = CLIPModel.from_pretrained(folder).logit_scale.exp()
    text = clip_text_embedding(folder, flags["pickscore_processor"], prompt)
    return float(scale) * cosine(clip_image_embedding(folder, image), text)


def clip(flags, image, prompt):
    folder = flags["clip_model"]
    return max(100 * cosine(clip_image_embedding(folder, image), clip_text_embedding(folder, folder, prompt)), 0)


def hps(flags, image, prompt, antialias):
    weights = {name: weight.float() for name, weight in torch.load(flags["hps_weights"])["state_dict"].items()}
    image_embedding = open_clip_image_embedding(weights, fit_into_square(image, antialias))
    return 100 * cosine(image_embedding, open_clip_text_embedding(weights, flags["hps_model"], prompt))


def aesthetic(flags, image):
    embedding = clip_image_embedding(flags["aesthetic_model"], image)
    return apply_head(torch.load(flags["aesthetic_weights"]), embedding / embedding.norm())


def imagereward(flags, image, prompt):
    weights = torch.load(flags["imagereward_weights"])
    embedding = imagereward_embedding(weights, flags["imagereward_processor"], image, prompt)
    return (apply_head(part_of(weights, "mlp."), embedding) - 0.16717362830052426) / 1.0333394966054072


def siglip(flags, image, prompt):
    model = SiglipModel.from_pretrained(flags["siglip_model"]).eval()
    pixels = to_pixels(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    ids = tokenize(flags["siglip_model"], prompt, 16)
    ids = torch.tensor([ids + [1] * (16 - len(ids))])
    image_embedding = model.vision_model(pixel_values=pixels).pooler_output[0]
    text_embedding = model.text_model(input_ids=ids).pooler_output[0]
    logit = math.exp(1.5) * cosine(image_embedding, text_embedding) - 0.5
    return 100 / (1 + math.exp(-logit))


def dinov2(flags, image, references):
    model = Dinov2Model.from_pretrained(flags["dinov2_model"]).eval()

    def embed(picture):
        return model(pixel_values=crop_centre(picture, 40)).last_hidden_state[0, 0]

    embedding = embed(image)
    return 100 * float(np.mean([cosine(embedding, embed(reference)) for reference in references]))


@torch.no_grad()
def expected_score(scorer, flags, image, prompt, references=()):
    """The score of an image. `flags` are those of `build_scorers`, `references` the images for dinov2."""
    if scorer == "aesthetic":
        return aesthetic(flags, image)
    if scorer == "dinov2":
        return dinov2(flags, image, references)
    if scorer in ("hps", "hps_no_antialias"):
        return hps(flags, image, prompt, antialias=scorer == "hps")
    formula = {"pickscore": pickscore, "clip": clip, "imagereward": imagereward, "siglip": siglip}[scorer]
    return formula(flags, image, prompt)
