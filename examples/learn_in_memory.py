"""Learn two tasks one after another, in memory, without files or downloads.

A tiny model is made here, which knows nothing; a real one is ContinualLearner("Qwen/Qwen2.5-0.5B", ...).
"""

from pathlib import Path
from tempfile import mkdtemp

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gainlora import ContinualLearner, Task

TEXT = "<pad> </s> <unk> Which team ? Is it urgent Output : billing support yes no the invoice page is stays now"
WORDS = TEXT.split()
words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1, bos_token_id=None, **sizes))

tickets = [{"text": f"the {noun} is {n}", "label": team} for n in range(20)
           for noun, team in (("invoice", "billing"), ("page", "support"))]  # fmt: skip
urgency = [{"text": f"{noun} {n} {end}", "label": answer} for n in range(20) for noun in ("invoice", "page")
           for end, answer in (("now", "yes"), ("stays", "no"))]  # fmt: skip

learner = ContinualLearner((model, tokenizer), method="gainlora-inflora", rank=8, learning_rate=0.01)
learner.learn(Task("tickets", train=tickets, instruction="Which team?"))
learner.learn(Task("urgency", train=urgency, instruction="Is it urgent?"))
print(learner.evaluate())
print(learner.generate(["the page is 7"], task="tickets"))

folder = Path(mkdtemp()) / "adapter"
learner.save(folder)
