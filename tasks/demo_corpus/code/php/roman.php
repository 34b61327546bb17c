<?php

const NUMERALS = [
    'M' => 1000, 'CM' => 900, 'D' => 500, 'CD' => 400,
    'C' => 100, 'XC' => 90, 'L' => 50, 'XL' => 40,
    'X' => 10, 'IX' => 9, 'V' => 5, 'IV' => 4, 'I' => 1,
];

function roman(int $number): string
{
    $out = '';
    foreach (NUMERALS as $letters => $value) {
        while ($number >= $value) {
            $out .= $letters;
            $number -= $value;
        }
    }
    return $out;
}

foreach ([4, 19, 1987] as $n) {
    echo "$n is ", roman($n), "\n";
}
