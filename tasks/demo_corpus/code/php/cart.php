<?php

class Cart
{
    private array $lines = [];

    public function add(string $name, int $cents, int $quantity = 1): void
    {
        $this->lines[] = ['name' => $name, 'cents' => $cents, 'qty' => $quantity];
    }

    public function total(): int
    {
        $sum = 0;
        foreach ($this->lines as $line) {
            $sum += $line['cents'] * $line['qty'];
        }
        return $sum;
    }
}

$cart = new Cart();
$cart->add('notebook', 320, 2);
$cart->add('pencil', 85);
echo number_format($cart->total() / 100, 2), PHP_EOL;
