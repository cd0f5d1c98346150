"""transformers' tests of every model, for three tiny ones of ours.

Run by `tools/upstream.py` in a copy of transformers' source distribution, from which it takes
`ModelTesterMixin` (tests/test_modeling_common.py). Of its tests those run that are about saving and
loading, or about what loading leaves; others load only to compare ways of computing.
"""

import sys
import types
import unittest

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralModel,
    set_seed,
)


def add_module(name, **attributes):
    """What the common tests import and the source distribution does not hold."""
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    module.__path__ = []
    sys.modules[name] = module


add_module("tests.exporters")
add_module("tests.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
add_module("tests.generation")
add_module(
    "tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {})
)

from tests.test_modeling_common import ModelTesterMixin  # noqa: E402

WORDS = (
    *("save", "load", "offload", "safetensors", "from_pretrained", "tied", "tie_", "keys"),
    *("missing", "mismatched", "init", "dtype", "meta", "keep_in_fp32", "resize"),
)
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


class Tester:
    """What the common tests ask about a model: its configuration and inputs."""

    batch_size, seq_length, is_training = 3, 7, True
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 32

    def __init__(self, config_class, **options):
        self.config_class, self.options = config_class, options

    def get_config(self):
        return self.config_class(**SIZES, **self.options)

    def prepare_config_and_inputs_for_common(self):
        shape = (self.batch_size, self.seq_length)
        tokens = torch.randint(1, SIZES["vocab_size"], shape)
        return self.get_config(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def only_those_about_files(case):
    """Other tests of the mixin are as if they were not there."""
    for name in dir(case):
        if name.startswith("test_") and not any(word in name for word in WORDS):
            setattr(case, name, None)
    return case


@only_those_about_files
class DenseTiedTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (LlamaModel, LlamaForCausalLM, LlamaForSequenceClassification)

    def setUp(self):
        set_seed(1)
        self.model_tester = Tester(
            LlamaConfig, num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0
        )


@only_those_about_files
class ExpertsTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (MixtralModel, MixtralForCausalLM)

    def setUp(self):
        set_seed(1)
        self.model_tester = Tester(
            MixtralConfig, num_key_value_heads=2, num_local_experts=4, pad_token_id=0
        )


@only_those_about_files
class EncoderTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (BertModel, BertForMaskedLM, BertForSequenceClassification)

    def setUp(self):
        set_seed(1)
        self.model_tester = Tester(BertConfig)
