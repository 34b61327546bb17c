import java.util.ArrayDeque;
import java.util.Deque;

public class MovingAverage {
    private final int window;
    private final Deque<Double> recent = new ArrayDeque<>();
    private double sum;

    public MovingAverage(int window) {
        this.window = window;
    }

    public double next(double sample) {
        recent.addLast(sample);
        sum += sample;
        if (recent.size() > window) {
            sum -= recent.removeFirst(); // forget the oldest sample
        }
        return sum / recent.size();
    }
}
