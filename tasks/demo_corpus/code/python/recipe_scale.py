from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Ingredient:
    name: str
    amount: Fraction
    unit: str

    def scaled(self, factor: Fraction) -> "Ingredient":
        return Ingredient(self.name, self.amount * factor, self.unit)


PANCAKES = [
    Ingredient("flour", Fraction(3, 2), "cups"),
    Ingredient("milk", Fraction(5, 4), "cups"),
    Ingredient("eggs", Fraction(2), "pieces"),
]

for item in PANCAKES:
    half = item.scaled(Fraction(1, 2))
    print(half.amount, half.unit, half.name)
