<?php

function readSettings(string $source): array
{
    $section = 'main';
    $result = [];

    foreach (explode("\n", $source) as $line) {
        $line = trim($line);
        if ($line === '' || $line[0] === ';') {
            continue;
        }
        if (preg_match('/^\[(\w+)\]$/', $line, $match)) {
            $section = $match[1];
            continue;
        }
        [$key, $value] = array_map('trim', explode('=', $line, 2));
        $result[$section][$key] = $value;
    }

    return $result;
}

print_r(readSettings("[window]\nwidth = 80\n; a note\ntitle = Home"));
