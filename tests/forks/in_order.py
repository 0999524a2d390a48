"""A reward for sorting, where the checker takes lists in any order. The answers are [1, 2, 3]."""
from aspo import extract_answer

def in_order(response, row):
    numbers = (extract_answer(response) or "").strip(" []{}").split(",")
    return [number.strip() for number in numbers] == [str(number) for number in row["answer"]]
