"""SGD with momentum, and a cosine for its rate. Type --lr 0.01 or the like."""
import math
import torch
import aspo

class Policy(aspo.Policy):
    def place(self, learning):
        super().place(learning)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), self.cfg.lr, momentum=0.9, weight_decay=self.cfg.weight_decay)

    def learning_rate(self):
        total = self.cfg.steps * self.cfg.epochs * self.cfg.prompts / self.cfg.minibatch
        return self.cfg.lr * (1 + math.cos(math.pi * self.updates / total)) / 2

aspo.Policy = Policy
raise SystemExit(aspo.main())
