using System;
using System.Collections.Generic;
using System.Linq;

public class TemperatureLog
{
    private readonly List<double> readings = new List<double>();

    public void Record(double celsius) => readings.Add(celsius);

    public double Average => readings.Count == 0 ? 0 : readings.Average();

    public double Warmest => readings.Max();
}

public static class Program
{
    public static void Main()
    {
        var log = new TemperatureLog();
        foreach (var value in new[] { 18.5, 21.0, 19.2 })
        {
            log.Record(value);
        }
        Console.WriteLine($"{log.Average:F1} / {log.Warmest:F1}");
    }
}
