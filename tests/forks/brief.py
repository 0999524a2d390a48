"""A reward of your own: right is 1, and each character costs a hundredth."""
import aspo

def brief(response, row):
    return aspo.math_reward(response, str(row["answer"])) - len(response) / 100

if __name__ == "__main__":
    aspo.train(aspo.parse(), reward=brief)
