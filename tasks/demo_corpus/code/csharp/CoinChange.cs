using System;
using System.Collections.Generic;

class CoinChange
{
    static readonly int[] Coins = { 200, 100, 50, 20, 10, 5, 2, 1 };

    static IEnumerable<(int Coin, int Count)> Split(int cents)
    {
        foreach (int coin in Coins)
        {
            int count = cents / coin;
            if (count > 0)
            {
                yield return (coin, count);
            }
            cents %= coin;
        }
    }

    static void Main()
    {
        foreach (var (coin, count) in Split(387))
        {
            Console.WriteLine($"{count} x {coin}");
        }
    }
}
