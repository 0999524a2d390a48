"""For base models: a worked example before each question, and a string at which they stop."""
import torch
import aspo

SHOTS, STOP = "What is 2+2?\nAnswer: 4\n\nQuestion: ", "\nQuestion:"
encode, has_ended = aspo.Policy.encode, aspo.Policy.has_ended

def has_said(self, tokens):  # (B, T) -> (B,)
    said = [STOP in text for text in self.tokenizer.batch_decode(tokens[:, -16:])]
    return has_ended(self, tokens) | torch.tensor(said, device=tokens.device)

aspo.Policy.has_ended = has_said
aspo.Policy.encode = lambda self, problem: encode(
    self, problem | {"problem": SHOTS + problem["problem"]})
raise SystemExit(aspo.main())
