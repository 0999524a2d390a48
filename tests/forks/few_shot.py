"""For base models: a worked example before each question, and any token with a line end stops."""
import aspo

SHOTS = "What is 2+2?\nAnswer: 4\n\nQuestion: "
encode, stop_tokens = aspo.Policy.encode, aspo.stop_tokens

def stop_at_line_end(model, tokenizer):
    ends = [i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])]
    return stop_tokens(model, tokenizer) + ends

aspo.stop_tokens = stop_at_line_end
aspo.Policy.encode = lambda self, problem: encode(
    self, problem | {"problem": SHOTS + problem["problem"]})
raise SystemExit(aspo.main())
