public class Fraction {
    private final long top;
    private final long bottom;

    public Fraction(long top, long bottom) {
        if (bottom == 0) {
            throw new ArithmeticException("zero denominator");
        }
        long d = gcd(Math.abs(top), Math.abs(bottom));
        this.top = top / d;
        this.bottom = bottom / d;
    }

    private static long gcd(long a, long b) {
        return b == 0 ? a : gcd(b, a % b);
    }

    public Fraction plus(Fraction o) {
        return new Fraction(top * o.bottom + o.top * bottom, bottom * o.bottom);
    }

    @Override
    public String toString() {
        return top + "/" + bottom;
    }
}
