<?php

/**
 * Turn a page title into something that is safe in a web address.
 */
function slug(string $title, int $limit = 40): string
{
    $text = strtolower(trim($title));
    $text = preg_replace('/[^a-z0-9]+/', '-', $text);
    $text = trim($text, '-');

    if (strlen($text) > $limit) {
        $text = rtrim(substr($text, 0, $limit), '-');
    }

    return $text === '' ? 'untitled' : $text;
}

echo slug('  Ten Easy Soups for Winter!  '), "\n";
echo slug('???'), "\n";
