using System;
using System.Collections.Generic;

public class Inventory
{
    private readonly Dictionary<string, int> stock = new();

    public int this[string item] => stock.TryGetValue(item, out var count) ? count : 0;

    public void Receive(string item, int count)
    {
        stock[item] = this[item] + count;
    }

    public void Ship(string item, int count)
    {
        if (this[item] < count)
        {
            throw new InvalidOperationException($"Not enough {item} in stock.");
        }
        stock[item] -= count;
    }
}
