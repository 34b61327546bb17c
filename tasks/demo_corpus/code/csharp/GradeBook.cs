using System;
using System.Collections.Generic;
using System.Linq;

var marks = new Dictionary<string, int[]>
{
    ["Amara"] = new[] { 88, 92, 79 },
    ["Jonas"] = new[] { 64, 71, 58 },
    ["Sofia"] = new[] { 95, 90, 99 },
};

string Letter(double average) => average switch
{
    >= 90 => "A",
    >= 75 => "B",
    >= 60 => "C",
    _ => "D",
};

foreach (var (name, list) in marks.OrderByDescending(m => m.Value.Average()))
{
    Console.WriteLine($"{name,-8}{list.Average(),6:F1}  {Letter(list.Average())}");
}
