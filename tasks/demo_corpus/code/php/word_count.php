<?php

function topWords(string $text, int $how_many): array
{
    $words = str_word_count(strtolower($text), 1);
    $counts = array_count_values($words);
    arsort($counts);

    return array_slice($counts, 0, $how_many, true);
}

$text = 'The cat sat by the door and the dog sat by the cat.';

// Print a small bar for each of the common words.
foreach (topWords($text, 3) as $word => $count) {
    echo str_pad($word, 6), str_repeat('#', $count), ' ', $count, "\n";
}
