"""A system prompt for chat models."""
import aspo

encode = aspo.Policy.encode

def with_system(self, problem):
    text = f"{problem['problem']}\n{self.cfg.instruction}".strip()
    chat = problem["messages"] or [{"role": "user", "content": text}]
    system = {"role": "system", "content": "You are careful with numbers."}
    return encode(self, problem | {"messages": [system, *chat]})

aspo.Policy.encode = with_system
raise SystemExit(aspo.main())
