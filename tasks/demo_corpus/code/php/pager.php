<?php

final class Pager
{
    public function __construct(
        private array $items,
        private int $perPage = 10,
    ) {
    }

    public function pages(): int
    {
        return max(1, (int) ceil(count($this->items) / $this->perPage));
    }

    public function page(int $number): array
    {
        // Out of range numbers fall back to the nearest page.
        $number = max(1, min($number, $this->pages()));
        return array_slice($this->items, ($number - 1) * $this->perPage, $this->perPage);
    }
}

$pager = new Pager(range(1, 23), 5);
echo $pager->pages(), ': ', implode(',', $pager->page(99)), "\n";
