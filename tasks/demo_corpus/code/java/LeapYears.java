import java.util.ArrayList;
import java.util.List;

public final class LeapYears {
    private LeapYears() {
    }

    static boolean isLeap(int year) {
        return year % 400 == 0 || (year % 4 == 0 && year % 100 != 0);
    }

    static List<Integer> between(int first, int last) {
        List<Integer> found = new ArrayList<>();
        for (int year = first; year <= last; year++) {
            if (isLeap(year)) {
                found.add(year);
            }
        }
        return found;
    }

    public static void main(String[] args) {
        System.out.println(between(1996, 2024));
    }
}
