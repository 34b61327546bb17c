public class GridPath {
    /** Cheapest walk from the top left to the bottom right corner. */
    static int cheapest(int[][] cost) {
        int[] best = new int[cost[0].length];
        for (int r = 0; r < cost.length; r++) {
            for (int c = 0; c < best.length; c++) {
                int up = r > 0 ? best[c] : Integer.MAX_VALUE;
                int left = c > 0 ? best[c - 1] : Integer.MAX_VALUE;
                int from = r + c == 0 ? 0 : Math.min(up, left);
                best[c] = from + cost[r][c];
            }
        }
        return best[best.length - 1];
    }
}
