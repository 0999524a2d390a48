"""SGD with momentum, and a cosine for its rate. Type --lr 0.01 or the like."""
import math
import torch
import aspo

def cosine(self):
    total = self.cfg.steps * self.cfg.epochs * self.cfg.prompts / self.cfg.minibatch
    return self.cfg.lr * (1 + math.cos(math.pi * self.updates / total)) / 2

aspo.make_optimizer = lambda model, cfg: torch.optim.SGD(model.parameters(), cfg.lr, momentum=0.9)
aspo.Policy.learning_rate = cosine
raise SystemExit(aspo.main())
