<?php

declare(strict_types=1);

function toFahrenheit(float $celsius): float
{
    return $celsius * 9 / 5 + 32;
}

function describe(float $celsius): string
{
    if ($celsius < 5) {
        return 'cold';
    }
    return $celsius < 22 ? 'mild' : 'warm';
}

$week = ['Monday' => 3.5, 'Tuesday' => 14.0, 'Wednesday' => 25.5];

foreach ($week as $day => $celsius) {
    printf("%-10s %5.1f F (%s)\n", $day, toFahrenheit($celsius), describe($celsius));
}
