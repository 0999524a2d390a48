"""Min-p: tokens of less than a tenth of the likeliest one's probability are never drawn."""
import aspo

draw = aspo.draw

def draw_likely(probs):  # (B, V) -> (B,). Top-k: probs >= probs.topk(50).values[:, -1:]
    return draw(probs * (probs >= 0.1 * probs.amax(-1, keepdim=True)))

aspo.draw = draw_likely
raise SystemExit(aspo.main())
