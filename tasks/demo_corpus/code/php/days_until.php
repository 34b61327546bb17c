<?php

function daysUntil(DateTimeImmutable $today, int $month, int $day): int
{
    $year = (int) $today->format('Y');
    $next = $today->setDate($year, $month, $day)->setTime(0, 0);

    if ($next < $today->setTime(0, 0)) {
        $next = $next->modify('+1 year');
    }

    return (int) $today->setTime(0, 0)->diff($next)->days;
}

$today = new DateTimeImmutable('2024-03-10');
echo daysUntil($today, 4, 1), " days to go\n";
echo daysUntil($today, 1, 6), " days to go\n";
