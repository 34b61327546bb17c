using System;
using System.Threading;
using System.Threading.Tasks;

public class Countdown
{
    public event Action<int>? Tick;

    public async Task RunAsync(int seconds, CancellationToken token = default)
    {
        for (int left = seconds; left > 0; left--)
        {
            Tick?.Invoke(left);
            await Task.Delay(TimeSpan.FromSeconds(1), token);
        }
    }

    public static async Task Main()
    {
        var countdown = new Countdown();
        countdown.Tick += left => Console.WriteLine($"{left}...");
        await countdown.RunAsync(3);
        Console.WriteLine("Tea is ready.");
    }
}
