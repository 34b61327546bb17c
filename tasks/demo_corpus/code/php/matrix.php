<?php

declare(strict_types=1);

function transpose(array $rows): array
{
    $columns = [];
    foreach ($rows as $r => $row) {
        foreach ($row as $c => $cell) {
            $columns[$c][$r] = $cell;
        }
    }
    return $columns;
}

function show(array $rows): void
{
    foreach ($rows as $row) {
        echo implode(' ', $row), PHP_EOL;
    }
}

show(transpose([
    [1, 2, 3],
    [4, 5, 6],
]));
