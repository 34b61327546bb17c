/** A parcel whose postage depends on weight and distance. */
public class Parcel {
    enum Zone {
        LOCAL(1.0), NATIONAL(1.6), ABROAD(3.2);

        final double factor;

        Zone(double factor) {
            this.factor = factor;
        }
    }

    private final int grams;
    private final Zone zone;

    public Parcel(int grams, Zone zone) {
        this.grams = grams;
        this.zone = zone;
    }

    public double postage() {
        double base = 2.50 + 0.004 * grams;
        return Math.round(base * zone.factor * 100) / 100.0;
    }
}
